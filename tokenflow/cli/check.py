"""`tokenflow plugins check NAME`: whether a plugin keeps its contract, by the conformance kit."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from transformers.utils.logging import disable_progress_bar

from tokenflow.diffusion import Backbone, ModelError
from tokenflow.diffusion.backbone import EMBEDDED, INDEX, families, imported
from tokenflow.diffusion.loading import folder_or_id
from tokenflow.editors import Editor
from tokenflow.errors import InputError, Interrupted, Preempted
from tokenflow.plugins import Plugin, offered_backbones
from tokenflow.testing import (
    Check,
    ConformanceError,
    backbone_checks,
    editor_checks,
    kernel_checks,
)


def verdict(plugin: Plugin, options: list[str]) -> int:
    """Prints the kit's result for one plugin; 1 if anything fails, else 0.

    Raises:
        InputError: The plugin needs another model than the one that it would be checked on.
    """
    if not plugin.usable:
        return unusable(plugin)
    chosen = parsed(plugin.kind, options)
    try:
        checks = checks_of(plugin.kind, chosen)
    except (InputError, Interrupted, Preempted):
        raise
    except (Exception, SystemExit) as error:  # a third party's constructor may raise anything
        print(f"FAILED  it cannot be made with these options: {type(error).__name__}: {error}")
        return concluded(plugin, 1)
    try:
        return concluded(plugin, run(checks, takes_backbone(plugin.kind)))
    except ModelError as error:
        raise InputError(
            f"{who(plugin)} does not fit the model that it is checked on: {error}; name one that "
            f"it fits with --backbone, a folder, a hub id or 'miniature'"
        ) from error


def backbone_verdict(plugin: Plugin, options: list[str]) -> int:
    """Prints the kit's result for one model family; 1 if anything fails, else 0.

    Raises:
        InputError: No model of the family was named, or it cannot be loaded.
    """
    if not plugin.usable:
        return unusable(plugin)
    parser = ArgumentParser(prog=f"tokenflow plugins check {plugin.name}")
    about = "A model of the family, a folder or a hub id: a tiny one with random weights is enough."
    parser.add_argument("--model", type=str, required=True, help=about)
    disable_progress_bar()
    named, kind = parser.parse_args(options).model, plugin.kind
    model = folder_or_id(str(EMBEDDED.get(named, named)), INDEX)
    assert kind is not None, "it is usable"
    try:
        checks = backbone_checks(kind.from_model(model, "cpu", torch.float32))
    except (InputError, Interrupted, Preempted):
        raise
    except (Exception, SystemExit) as error:  # a third party's code may raise anything
        print(f"FAILED  {model} cannot be loaded: {type(error).__name__}: {error}")
        return concluded(plugin, 1)
    return concluded(plugin, run(checks))


def installed_backbones() -> list[Plugin]:
    """All model families, with their classes, or the reason why one is unusable."""
    known = families()

    def loaded(plugin: Plugin) -> Plugin:
        if not plugin.usable:
            return plugin
        try:
            return replace(plugin, kind=imported(known[plugin.name]))
        except ModelError as error:
            return replace(plugin, reason=str(error))

    return [loaded(plugin) for plugin in offered_backbones()]


def who(plugin: Plugin) -> str:
    """A plugin's name, package and version."""
    return f"{plugin.name} of {plugin.distribution}"


def unusable(plugin: Plugin) -> int:
    """Prints why a plugin is unusable; 1."""
    print(f"{who(plugin)} is unusable: {plugin.reason}")
    return 1


def concluded(plugin: Plugin, failed: int) -> int:
    """Prints how many checks have failed; 1 if any, else 0."""
    print(f"{who(plugin)}: {f'{failed} failed' if failed else 'all is well'}")
    return 1 if failed else 0


def run(checks: list[Check], needs_model: bool = False) -> int:
    """Prints each check's result; how many have failed.

    Raises:
        ModelError: By a check, where it `needs_model` that fits.
    """
    failed = 0
    for one in checks:
        try:
            one()
        except ConformanceError as error:
            if isinstance(error.__cause__, ModelError) and needs_model:
                raise error.__cause__ from error
            failed += 1
            print(f"FAILED  {error}")
        else:
            print(f"ok      {one.__name__}")
    return failed


def parsed(kind: Any, options: list[str]) -> tuple[ArgumentParser, Namespace]:
    """The options of a command line for a plugin's class, and the parser that understood them."""
    parser = ArgumentParser(prog=f"tokenflow plugins check {kind.__name__}")
    try:
        parser.add_class_arguments(kind)
    except ValueError as error:  # --help is taken
        raise InputError(
            f"{kind.__name__} cannot be checked, rename the option: {error}"
        ) from error
    disable_progress_bar()  # of models' loading
    if takes_backbone(kind):
        about = (
            "What an editor is checked on: a folder, a hub id, an embedded model such as "
            "'miniature', or 'tiny', one with random weights."
        )
        parser.add_argument("--backbone", type=str, default="tiny", help=about)
    return parser, parser.parse_args(options)


def checks_of(kind: Any, options: tuple[ArgumentParser, Namespace]) -> list[Check]:
    """The kit's checks of a plugin's class, made with options."""
    parser, given = options
    chosen = parser.instantiate(given).as_dict()
    model = chosen.pop("backbone") if takes_backbone(kind) else "tiny"
    plugin = kind(**chosen)
    if not isinstance(plugin, Editor):
        return kernel_checks(plugin)
    return editor_checks(
        plugin, None if model == "tiny" else Backbone.load(model, "cpu", "float32")
    )


def takes_backbone(kind: Any) -> bool:
    """Whether `check` has --backbone for a class.

    An editor with such an option of its own is checked on random weights.
    """
    return issubclass(kind, Editor) and "backbone" not in inspect.signature(kind).parameters
