"""Exceptions of a plugin's own code, told with the plugin's name, package and version."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

from torch import OutOfMemoryError

from tokenflow.editors import Editor
from tokenflow.errors import InputError, Interrupted, PluginError, Preempted
from tokenflow.plugins import origin
from tokenflow.propagation import OpticalFlow, Propagation

P = ParamSpec("P")
R = TypeVar("R")


def named(plugin: Editor | Propagation | OpticalFlow) -> str:
    """A plugin's name, package and version."""
    return f"{type(plugin).__name__} of {origin(type(plugin))}"


def guarded(plugin: Editor | Propagation | OpticalFlow, function: Callable[P, R]) -> Callable[P, R]:
    """A plugin's function, whose exceptions are raised as `PluginError` from the original.

    `InputError` passes as it is, since its message is for the user already, and so does a lack of
    memory, which is not the plugin's fault.
    """

    @wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> R:
        try:
            return function(*args, **options)
        except (InputError, OutOfMemoryError, Interrupted, Preempted):
            raise
        except (Exception, SystemExit) as error:  # a third party's code may raise anything
            frames = traceback.extract_tb(error.__traceback__)
            home = getattr(sys.modules.get(type(plugin).__module__), "__file__", None)
            # its own last line says more than the line of a library that it called
            last = ([frame for frame in frames if frame.filename == home] or frames)[-1]
            name = getattr(function, "__name__", type(function).__name__)
            advice = (
                ""
                if isinstance(plugin, OpticalFlow)
                else (f": see tokenflow plugins check {type(plugin).__name__}")
            )
            raise PluginError(
                f"{named(plugin)} failed in {name}: {type(error).__name__}: {error} "
                f"({Path(last.filename).name}, line {last.lineno}); the plugin is to be mended"
                f"{advice}"
            ) from error

    return call
