"""Entry points to classes: the one way in which editors and kernels are found, ours included."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache
from hashlib import sha256
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from tokenflow.errors import InputError, Interrupted

OPTION = "--allow_imports"
"""Of the command line: it lets a configuration name classes of another package."""
GROUPS = {"tokenflow.editors": "Editor", "tokenflow.propagation": "Propagation"}
"""Each group of entry points is named as the module that has the plugins' base class."""
BACKBONES = "tokenflow.backbones"
"""The group of model families, each named as the pipeline in its models' index."""


CHANGES = {
    ("Editor", 1): "start(source, schedule, seed) returns Start(latents, step); edits(unet) is now "
    "injections(model), conditioning(forward) model_inputs(batch), constrain(...) advance(x, "
    "outputs, step, source), and content(frame) cache_key(frame); see docs/write-an-editor.md",
    ("Propagation", 1): "content() is now cache_key(), and a window has the site's name and the "
    "step; see docs/write-a-kernel.md",
}
"""What a plugin of an earlier interface has to change."""


@dataclass(frozen=True)
class Plugin:
    """One entry point: its class, or the reason why it cannot be used.

    `distribution` is the package's name and version, `path` the class path that is offered. A
    plugin that is unusable for its name alone has both a class and a reason. `ours` are those of
    tokenflow itself. One that was not loaded has neither class nor reason.
    """

    name: str
    group: str
    distribution: str
    path: str
    kind: type[Any] | None = None
    reason: str = ""
    ours: bool = False

    @property
    def usable(self) -> bool:
        return not self.reason


def entry(of: EntryPoint) -> Plugin:
    """A plugin by its entry point's metadata, without an import."""
    dist = of.dist
    where = f"{dist.name} {dist.version}" if dist is not None else "unknown distribution"
    ours = dist is not None and canonical(dist.name or "") == "tokenflow"
    return Plugin(of.name, of.group, where, of.value.replace(":", "."), ours=ours)


def base_of(group: str) -> Any:
    """The class that a group's plugins extend; imported on first use."""
    return getattr(import_module(group), GROUPS[group])


def load(of: EntryPoint) -> Plugin:
    """Imports one entry point; an error is recorded and affects no other plugin."""
    found = entry(of)
    expected = base_of(of.group)
    try:
        kind: Any = of.load()
    except (KeyboardInterrupt, Interrupted):
        raise
    except BaseException as error:  # a third party's module may raise anything, or exit
        reason = f"import of {of.value} failed: {type(error).__name__}: {error}"
    else:
        if not (isinstance(kind, type) and issubclass(kind, expected)):
            reason = f"{of.value} is no subclass of {expected.__name__}"
        elif kind.__name__ != of.name:
            reason = f"the entry point is named {of.name!r} but its class {kind.__name__!r}"
        elif (interface := stated_interface(kind)) is None:
            reason = (
                f"it does not say which interface of {expected.__name__} it was written for; add "
                f"interface = {expected.interface} to the class"
            )
        elif interface != expected.interface:
            reason = (
                f"it was written for interface {interface!r} of {expected.__name__}, "
                f"this is interface {expected.interface}{changes(expected.__name__, interface)}"
            )
        else:
            return replace(found, kind=kind)
    return replace(found, reason=reason)


def changes(base: str, interface: object) -> str:
    """What has changed since an interface of Editor or Propagation, where that is known."""
    found = CHANGES.get((base, interface)) if isinstance(interface, int) else None
    return f": {found}" if found else ""


def canonical(name: str) -> str:
    """A distribution's name in the one form of all its spellings (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def stated_interface(kind: type[Any]) -> object:
    """The interface that a class was written for, which a third party's does not inherit from ours.

    Else every plugin would be of whatever interface is installed.
    """
    ours = kind.__module__.split(".")[0] == "tokenflow"
    for base in kind.__mro__:
        if "interface" in vars(base) and (ours or base.__module__.split(".")[0] != "tokenflow"):
            return vars(base)["interface"]
    return None


def every_entry_point() -> list[EntryPoint]:
    """Those of all groups."""
    return [entry for group in GROUPS for entry in entry_points(group=group)]


def offered_plugins() -> tuple[Plugin, ...]:
    """All editors and kernels as their packages offer them; none is imported."""
    return settled(map(entry, every_entry_point()))


def offered_backbones() -> tuple[Plugin, ...]:
    """All model families as their packages offer them; none is imported."""
    return settled(map(entry, entry_points(group=BACKBONES)))


@cache
def installed_plugins() -> tuple[Plugin, ...]:
    """All editors and kernels, usable or not, in the order of group and name."""
    return settled(map(load, every_entry_point()))


def settled(found: Iterable[Plugin]) -> tuple[Plugin, ...]:
    """The plugins in order, those with another's name unusable.

    Where two distributions offer the same name, neither is used, since names never shadow silently;
    but those of tokenflow stay tokenflow's.
    """
    plugins = sorted(found, key=lambda p: (p.group, p.name, p.distribution))
    offered: dict[tuple[str, str], list[str]] = {}
    for p in plugins:
        offered.setdefault((p.group, p.name), []).append(p.distribution)

    def alone(p: Plugin) -> Plugin:
        by = offered[p.group, p.name]
        if len(by) == 1 or p.ours:
            return p
        reason = (
            f"the name is offered by {' and '.join(by)}; uninstall one, or choose by class path"
        )
        return replace(p, reason=reason)

    return tuple(map(alone, plugins))


def describe(plugins: list[Plugin] | tuple[Plugin, ...]) -> str:
    """What is installed and what failed to load, in one sentence."""
    usable = ", ".join(p.name for p in plugins if p.usable) or "nothing"
    broken = "; ".join(f"{p.name} of {p.distribution}: {p.reason}" for p in plugins if not p.usable)
    return f"installed are: {usable}" + (f"; unusable: {broken}" if broken else "")


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """The known word that is closest to one that was misspelt, if any is close."""
    lower = {name.lower(): name for name in known}
    close = get_close_matches(word.lower(), lower, 1)
    return f"; did you mean {lower[close[0]]}" if close else ""


def no_option(option: str, kind: str, known: Sequence[str]) -> str:
    """What to say of an option that a class does not have."""
    return (
        f"{kind} has no option {option!r}{did_you_mean(option, known)}; its options are "
        f"{', '.join(known) or 'none'}"
    )


def origin(kind: type[Any]) -> str:
    """The package and version that offers a class, else the module that holds it."""
    # another package may offer our class, too, as an unusable plugin: usable ones overwrite it
    offered = {p.kind: p.distribution for p in sorted(installed_plugins(), key=lambda p: p.usable)}
    if kind in offered:
        return offered[kind]
    return f"{kind.__module__} (not installed as a plugin)"


def code_of(kind: type[Any]) -> str:
    """A digest of the file that holds a third party's class; none of ours, whose version counts."""
    if kind.__module__.split(".")[0] == __name__.split(".")[0]:
        return ""
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    return sha256(Path(file).read_bytes()).hexdigest() if file and Path(file).is_file() else ""


def require_usable(path: str, group: str) -> None:
    """Raises `InputError` with the reason for a class path that is a group's unusable plugin's."""
    package, name = path.split(".")[0], path.split(".")[-1]
    for p in installed_plugins():
        # between package and name, a class may have several paths
        if (p.kind, p.name, p.group, p.path.split(".")[0]) == (None, name, group, package):
            raise InputError(f"{p.name} of {p.distribution} cannot be used: {p.reason}")
