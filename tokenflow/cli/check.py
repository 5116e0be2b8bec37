"""`tokenflow plugins check NAME`: whether a plugin keeps its contract, by the conformance kit."""

from __future__ import annotations

import inspect
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from transformers.utils.logging import disable_progress_bar

from tokenflow.diffusion import Backbone, ModelError
from tokenflow.editors import Editor
from tokenflow.errors import InputError, Interrupted, Preempted
from tokenflow.plugins import Plugin
from tokenflow.testing import Check, ConformanceError, editor_checks, kernel_checks


def verdict(plugin: Plugin, options: list[str]) -> int:
    """Prints the kit's result for one plugin; 1 if anything fails, else 0.

    Raises:
        InputError: The plugin needs another model than the one that it would be checked on.
    """
    who = f"{plugin.name} of {plugin.distribution}"
    if not plugin.usable:
        print(f"{who} is unusable: {plugin.reason}")
        return 1
    chosen = parsed(plugin.kind, options)
    try:
        checks = checks_of(plugin.kind, chosen)
    except (InputError, Interrupted, Preempted):
        raise
    except (Exception, SystemExit) as error:  # a third party's constructor may raise anything
        print(f"FAILED  it cannot be made with these options: {type(error).__name__}: {error}")
        checks, failed = [], 1
    else:
        failed = 0
    for one in checks:
        try:
            one()
        except ConformanceError as error:
            if isinstance(error.__cause__, ModelError) and takes_backbone(plugin.kind):
                raise InputError(
                    f"{who} does not fit the model that it is checked on: {error.__cause__}; name "
                    f"one that it fits with --backbone, a folder, a hub id or 'miniature'"
                ) from error
            failed += 1
            print(f"FAILED  {error}")
        else:
            print(f"ok      {one.__name__}")
    print(f"{who}: {f'{failed} failed' if failed else 'all is well'}")
    return 1 if failed else 0


def parsed(kind: Any, options: list[str]) -> tuple[ArgumentParser, Namespace]:
    """The options of a command line for a plugin's class, and the parser that understood them."""
    parser = ArgumentParser(prog=f"tokenflow plugins check {kind.__name__}")
    parser.add_class_arguments(kind)
    disable_progress_bar()  # of models' loading
    if takes_backbone(kind):
        about = (
            "What an editor is checked on: a folder, a hub id, 'miniature', the embedded model, or "
            "'tiny', one with random weights."
        )
        parser.add_argument("--backbone", type=str, default="tiny", help=about)
    return parser, parser.parse_args(options)


def checks_of(kind: Any, options: tuple[ArgumentParser, Namespace]) -> list[Check]:
    """The kit's checks of a plugin's class, made with options."""
    parser, given = options
    chosen = vars(parser.instantiate(given))
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
