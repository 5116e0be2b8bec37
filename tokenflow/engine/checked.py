"""A plugin's answers, checked, and its exceptions, with the plugin's name, package and version."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import OutOfMemoryError, Tensor

from tokenflow.diffusion import Backbone, Conditioning, Schedule, Site, Source, Traits
from tokenflow.editors import (
    Batch,
    Editor,
    Injection,
    Processor,
    Prompts,
    Start,
    Step,
    editor_contract,
)
from tokenflow.engine.settings import Settings
from tokenflow.errors import InputError, Interrupted, PluginError, Preempted
from tokenflow.plugins import changes, origin, stated_interface
from tokenflow.propagation import OpticalFlow, Propagation
from tokenflow.video import Clip
from tokenflow.violations import Violation, require_none

AnyPlugin = Editor | Propagation | OpticalFlow


def named(plugin: AnyPlugin) -> str:
    """A plugin's name, package and version."""
    return f"{type(plugin).__name__} of {origin(type(plugin))}"


def require_interface(plugin: Editor | Propagation) -> None:
    """Raises `PluginError` for a class that states an earlier interface than this one."""
    stated = stated_interface(type(plugin))
    base = Editor if isinstance(plugin, Editor) else Propagation
    if isinstance(stated, int) and stated < base.interface:
        raise PluginError(
            f"{named(plugin)} was written for interface {stated} of {base.__name__}, this is "
            f"interface {base.interface}{changes(base.__name__, stated)}"
        )


def require_kinds(editor: object, propagation: object, settings: object) -> None:
    """Raises `InputError` for what is no editor, kernel or settings, such as a class or a name."""
    for value, kind, example in (
        (editor, Editor, "PnP()"),
        (propagation, Propagation, "NNField()"),
        (settings, Settings, "Settings(steps=25)"),
    ):
        if not isinstance(value, kind):
            raise InputError(f"expected {kind.__name__}, as {example}, got {value!r:.200}")


@contextmanager
def blamed(plugin: AnyPlugin, function: str) -> Iterator[None]:
    """A block that calls a plugin's function; exceptions become a `PluginError` that names it.

    `InputError` passes as it is, since its message is for the user already, and so does a lack of
    memory, which is not the plugin's fault.
    """
    try:
        yield
    except (InputError, OutOfMemoryError, Interrupted, Preempted):
        raise
    except (Exception, SystemExit) as error:  # a third party's code may raise anything
        frames = traceback.extract_tb(error.__traceback__)
        home = getattr(sys.modules.get(type(plugin).__module__), "__file__", None)
        # the last line of its own module is more useful than that of a library which it called
        last = ([frame for frame in frames if frame.filename == home] or frames)[-1]
        kit = f": see tokenflow plugins check {type(plugin).__name__}"
        raise PluginError(
            f"{named(plugin)} failed in {function}: {type(error).__name__}: {error} "
            f"({Path(last.filename).name}, line {last.lineno}); fix the plugin"
            f"{'' if isinstance(plugin, OpticalFlow) else kit}"
        ) from error


class CheckedEditor(Editor):
    """An editor whose answers are checked against the contract, by the same methods."""

    def __init__(self, editor: Editor, model: Backbone) -> None:
        require_interface(editor)
        self.editor, self.model, self.name = editor, model, named(editor)
        self.inverts = editor.inverts  # type: ignore[misc]
        self.joint_source = editor.joint_source  # type: ignore[misc]

    def require(self, broken: Iterator[Violation], function: str) -> None:
        """Raises `PluginError` with the first rule that an answer breaks."""
        require_none(broken, f"{self.name} in {function}")

    @property
    def guided(self) -> Sequence[str]:
        return self.editor.guided

    def idle(self, step: Step) -> Sequence[str]:
        with blamed(self.editor, "idle"):
            found = self.editor.idle(step)
        self.require(editor_contract.of_idle(found, step), "idle")
        return found

    @property
    def conditions_source(self) -> bool:
        return self.editor.conditions_source

    @property
    def sees_other_frames(self) -> bool:
        return self.editor.sees_other_frames

    @property
    def needs_source(self) -> bool:
        return self.editor.needs_source or self.editor.conditions_source

    def branches(self, prompts: Prompts) -> Mapping[str, str]:
        with blamed(self.editor, "branches"):
            found = self.editor.branches(prompts)
        self.require(editor_contract.of_branches(found), "branches")
        return found

    def check_model(self, model: Traits) -> None:
        with blamed(self.editor, "check_model"):
            self.editor.check_model(model)

    def check_steps(self, steps: int) -> None:
        with blamed(self.editor, "check_steps"):
            self.editor.check_steps(steps)

    def prepare(self, model: Backbone, clip: Clip) -> None:
        self.check_model(model.traits)
        with blamed(self.editor, "prepare"):
            self.editor.prepare(model, clip)

    def cache_key(self, frame: int) -> str:
        with blamed(self.editor, "cache_key"):
            return self.editor.cache_key(frame)

    def start(self, source: Source, schedule: Schedule, seed: int) -> Start:
        with blamed(self.editor, "start"):
            begin = self.editor.start(source, schedule, seed)
        self.require(editor_contract.of_start(begin, source, schedule), "start")
        return begin

    def inputs(self, x: Tensor, step: Step, source: Source) -> Tensor:
        with blamed(self.editor, "inputs"):
            found = self.editor.inputs(x, step, source)
        self.require(editor_contract.of_inputs(found, x, len(step.branches)), "inputs")
        return found

    def clean_after(self, step: Step) -> bool:
        with blamed(self.editor, "clean_after"):
            return self.editor.clean_after(step)

    def kept(self, step: Step, source: Source) -> Tensor:
        with blamed(self.editor, "kept"):
            found = self.editor.kept(step, source)
        self.require(editor_contract.of_kept(found, source.clean), "kept")
        return found

    def conditioning(self, batch: Batch) -> Conditioning:
        with blamed(self.editor, "conditioning"):
            found = self.editor.conditioning(batch)
        self.require(editor_contract.of_conditioning(found, batch), "conditioning")
        return found

    def model_inputs(self, batch: Batch) -> dict[str, Any]:
        with blamed(self.editor, "model_inputs"):
            extra = self.editor.model_inputs(batch)
        self.require(editor_contract.of_model_inputs(extra, self.model), "model_inputs")
        return extra

    def injections(self, model: Backbone) -> Sequence[Injection]:
        with blamed(self.editor, "injections"):
            found = list(self.editor.injections(model))
        self.require(editor_contract.of_injections(found, model), "injections")
        return found

    def inject(self, injection: Injection, edited: Tensor, source: Tensor, batch: Batch) -> Tensor:
        """The answer of an injection's function."""
        assert injection.function is not None, "the network replaces outputs itself"
        with blamed(self.editor, "an injection"):
            result = injection.function(edited, source, batch)
        self.require(editor_contract.of_injection(result, edited), "an injection")
        return result

    def cross_attention(self, model: Backbone) -> Mapping[str, Processor]:
        with blamed(self.editor, "cross_attention"):
            found = self.editor.cross_attention(model)
        self.require(editor_contract.of_cross_attention(found, model), "cross_attention")
        return found

    def attend(
        self,
        processor: Processor,
        batch: Batch,
        site: Site,
        hidden_states: Tensor,
        *args: Any,
        **given: Any,
    ) -> Tensor:
        """The answer of a cross-attention's processor."""
        with blamed(self.editor, "cross_attention"):
            result = processor(batch, site, hidden_states, *args, **given)
        self.require(editor_contract.of_attention(result, hidden_states), "cross_attention")
        return result

    def advance(
        self, x: Tensor, outputs: Mapping[str, Tensor], step: Step, source: Source
    ) -> Tensor:
        with blamed(self.editor, "advance"):
            found = self.editor.advance(x, outputs, step, source)
        self.require(editor_contract.of_advance(found, x), "advance")
        return found
