"""What an editor's answers must be, told to the author of one whose are not."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence

from diffusers import UNet2DConditionModel
from torch import Tensor

from tokenflow.contract import Violation
from tokenflow.diffusion import Schedule, Trajectory
from tokenflow.editors.base import Edit, Start

OWN = ("self", "sample", "timestep", "encoder_hidden_states", "return_dict")
"""The UNet's arguments that the engine gives."""


def of_start(begin: object, trajectory: Trajectory, schedule: Schedule) -> Iterator[Violation]:
    """The rules that the answer of `Editor.start` breaks: "form", "finite", "timesteps"."""
    if not isinstance(begin, Start):
        yield Violation(
            "form", "a Start", type(begin).__name__,
            "return tokenflow.editors.Start(latents, timesteps)",
        )  # fmt: skip
        return
    like = trajectory.clean
    advice = "start from trajectory.at(t), or from noise of its shape and dtype"
    broken = list(of_tensor(begin.latents, like, "first latents", advice, "form"))
    yield from broken
    if not broken and not begin.latents.isfinite().all():
        yield Violation("finite", "finite first latents", "NaN or infinite values", advice)
    steps, every = begin.timesteps, schedule.timesteps
    if not (isinstance(steps, Sequence) and steps and tuple(steps) == every[-len(steps) :]):
        yield Violation(
            "timesteps", f"the schedule's timesteps {every}, or a tail of them", steps,
            "choose from schedule.timesteps, as schedule.timesteps[n:]: every step leads to the "
            "schedule's next",
        )  # fmt: skip


def of_edits(edits: Sequence[object], unet: UNet2DConditionModel) -> Iterator[Violation]:
    """The rule that the answer of `Editor.edits` breaks: "edits"."""
    modules = set(unet.modules())
    for number, edit in enumerate(edits):
        if not (
            isinstance(edit, Edit)
            and edit.module in modules
            and callable(edit.function)
            and 0 <= edit.until <= 1
        ):
            found = " ".join(repr(edit).split())
            yield Violation(
                "edits", "Edits of the UNet's modules, until from 0 to 1",
                f"{found:.80} as number {number}",
                "make them from the modules of the UNet that edits() is given",
            )  # fmt: skip


def of_edit(result: object, edited: Tensor) -> Iterator[Violation]:
    """The rules that the answer of an edit's function breaks: "answer"."""
    advice = "the function must return all edited branches and frames, in the dtype they came in"
    return of_tensor(result, edited, "the edited output", advice)


def of_constrain(result: object, latents: Tensor) -> Iterator[Violation]:
    """The rules that the answer of `Editor.constrain` breaks: "answer"."""
    advice = "return as many frames as are given, in the dtype they came in"
    return of_tensor(result, latents, "latents from constrain()", advice)


def of_conditioning(extra: object, unet: UNet2DConditionModel) -> Iterator[Violation]:
    """The rule that the answer of `Editor.conditioning` breaks: "conditioning"."""
    known = inspect.signature(type(unet).forward).parameters.keys() - OWN
    if not isinstance(extra, dict):
        advice = "return {} where there is nothing to add"
        yield Violation("conditioning", "a dict of UNet arguments", type(extra).__name__, advice)
    elif wrong := [name for name in extra if name not in known]:
        yield Violation(
            "conditioning", f"further arguments of the UNet: {', '.join(sorted(known))}", wrong,
            "leave out what the UNet does not know or the engine gives itself",
        )  # fmt: skip


def of_tensor(
    value: object, like: Tensor, what: str, advice: str, rule: str = "answer"
) -> Iterator[Violation]:
    """What a tensor does not have in common with another of which it takes the place."""
    if not isinstance(value, Tensor):
        yield Violation(rule, f"{what} in a tensor", type(value).__name__, advice)
    elif value.shape != like.shape:
        expected = f"{what} of shape {tuple(like.shape)}"
        yield Violation(rule, expected, tuple(value.shape), advice)
    elif value.dtype != like.dtype:
        yield Violation(rule, f"{what} of dtype {like.dtype}", value.dtype, advice)
