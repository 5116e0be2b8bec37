"""What the page can offer: plugins that it can read, and of these the editors that fit a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from tokenflow.app.options import Option, needed_by, options_of
from tokenflow.diffusion import Traits
from tokenflow.diffusion.backbone import EMBEDDED
from tokenflow.engine.lightning.job import PLUGINS
from tokenflow.errors import explained
from tokenflow.plugins import GROUPS, Plugin, installed_plugins
from tokenflow.storage.paths import local

GROUP_OF = dict(zip(PLUGINS, GROUPS, strict=True))


def plugins(name: str) -> dict[str, Plugin]:
    """The editors, or kernels ("propagation"), by their names, that the page can offer."""
    return {one.name: one for one in examined(name) if one.usable}


def examined(name: str) -> list[Plugin]:
    """All editors or kernels, those that the page cannot offer with the reason."""
    return [readable(one) for one in installed_plugins() if one.group == GROUP_OF[name]]


def readable(plugin: Plugin) -> Plugin:
    """A plugin, with the reason if its options cannot be read, or files must be among them."""
    if plugin.kind is None or plugin.reason:
        return plugin
    try:
        needed = ", ".join(sorted(needed_by(plugin.kind)))
        options_of(plugin.kind)
    except Exception as error:  # of a third party's types
        reason = f"the types of its options are not known: {type(error).__name__}: {error}"
    else:
        reason = needed and f"it needs {needed}, which only a command line names"
    return dataclasses.replace(plugin, reason=reason)


def plugin_options(plugin: Plugin, models: Sequence[str]) -> list[Option]:
    """A plugin's options; one that names a model may also name those of the command line."""
    more = [model for model in models if model not in EMBEDDED]
    return [
        dataclasses.replace(one, choices=tuple(dict.fromkeys((*one.choices, *more))))
        if one.name == "model" and one.kind == "choice"
        else one
        for one in options_of(plugin.kind)  # type: ignore[arg-type]
    ]


def fitting(traits: Traits | None, models: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """The editors that fit a model, and why other editors and kernels are left out.

    Each by its name, with what its option `model` may be of the command line's `models`, "" where
    it has none. Of a model that is not known all editors fit.
    """
    fit, left_out = dict[str, list[str]](), list[str]()
    for plugin in (plugin for name in PLUGINS for plugin in examined(name)):
        if not plugin.usable:
            left_out.append(f"{plugin.name} of {plugin.distribution}: {plugin.reason}")
        elif plugin.group == GROUP_OF["editor"]:
            options = {one.name: one.choices for one in plugin_options(plugin, models)}
            reasons = {one: misfit(plugin, traits, one) for one in options.get("model") or ("",)}
            fit[plugin.name] = [one for one, reason in reasons.items() if not reason]
            if not fit[plugin.name]:
                del fit[plugin.name]
                left_out.append(f"{plugin.name}: {next(iter(reasons.values()))}")
    return fit, left_out


def misfit(plugin: Plugin, traits: Traits | None, model: str) -> str:
    """Why an editor cannot edit with a model; "" if it can. The hub is not asked about `model`."""
    if traits is None or (model and model not in EMBEDDED and not local(model).exists()):
        return ""
    try:
        plugin.kind(**({"model": model} if model else {})).check_model(traits)  # type: ignore[misc]
    except (Exception, SystemExit) as error:  # a third party's may raise anything
        return explained(error)
    return ""
