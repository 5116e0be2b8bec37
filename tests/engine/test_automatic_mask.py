"""Automatic masks: where the prompts' predictions differ, still along the motion, and alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.gaussian_flow import GaussianFlow
from tests.gaussian_noise import GaussianNoise
from tokenflow.diffusion import Backbone, Conditioning
from tokenflow.editors import DDCM, Editor, FlowEdit, PnP, Prompts
from tokenflow.engine import Settings, automatic_mask, edit_clip
from tokenflow.engine.ranks.group import FrameGroup
from tokenflow.engine.resume import ResumeStore
from tokenflow.errors import InputError, Preempted
from tokenflow.propagation import NNField, OpticalFlow
from tokenflow.storage.cache import Cache
from tokenflow.testing.threads import on_ranks
from tokenflow.video import Clip

PROMPTS = Prompts("0.9", "-0.2", "0.4")
FRAMES, HEIGHT, WIDTH = 5, 6, 12


class Drift(OpticalFlow):
    """Everything moves to the right by so many pixels a frame."""

    def __init__(self, speed: int) -> None:
        self.speed = speed

    def between(self, clip: Clip, start: int, end: int) -> Tensor:
        flow = torch.zeros(2, *clip.frames.shape[-2:])
        flow[0] = self.speed * (end - start)
        return flow


class Somewhere(GaussianFlow):
    """The prompt counts in a part of the picture."""

    where = torch.zeros(HEIGHT, WIDTH)
    where[:, 4:6] = 1

    def of(self, latents: Tensor) -> Tensor:
        return self.where

    def predict(self, latents: Tensor, t: float, conditioning: Conditioning, **_: Any) -> Tensor:
        mean = conditioning["mean"]
        self.asked = t
        plain = super().predict(latents, t, Conditioning(mean=torch.zeros_like(mean)))
        return plain - mean.view(-1, 1, 1, 1) * self.of(latents)


class WhereNoiseIs(Somewhere):
    def of(self, latents: Tensor) -> Tensor:
        return latents


class NoiseSomewhere(Somewhere, GaussianNoise):
    """The same of noise."""


def clip(speed: int = 0) -> Clip:
    """A picture that drifts."""
    wide = torch.rand(3, HEIGHT, WIDTH + FRAMES, generator=torch.Generator().manual_seed(0))
    shown = [wide[:, :, FRAMES - speed * f :][:, :, :WIDTH] for f in range(FRAMES)]
    return Clip.from_frames(torch.stack(shown))


def edited(model: Backbone, editor: Editor | None = None, speed: int = 0, **given: Any) -> Any:
    kernel = NNField()
    kernel.flow = Drift(speed)
    options: dict[str, Any] = {"steps": 4, "keyframe_every": 2, "batch": 2, "consistency": "none"}
    options |= {name: given.pop(name) for name in ("seed", "consistency") if name in given}
    prompts, mask = given.pop("prompts", PROMPTS), given.pop("mask", "auto")
    return edit_clip(
        model, clip(speed), prompts, editor or PnP(), kernel, Settings(**options), mask=mask,
        **given,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "editor", "consistency"),
    [
        (Somewhere, PnP(), "joint"),
        (Somewhere, FlowEdit(3), "tokenflow"),
        (NoiseSomewhere, DDCM(), "none"),
    ],
)
def test_the_edit_stays_where_the_prompts_differ(
    kind: type[Somewhere], editor: Editor, consistency: str
) -> None:
    found = edited(kind(), editor, consistency=consistency)
    mask = found.mask.frames[:]
    expected = torch.zeros(WIDTH)
    expected[3:7] = 1  # with one pixel more at each side
    assert torch.equal(mask, expected.expand_as(mask))
    outside = mask == 0
    assert torch.equal(found.clip.frames[outside], clip().frames[outside])
    assert (found.clip.frames - clip().frames)[:, :, :, 4:6].abs().min() > 1e-3
    # given back, it is the user's own
    again = edited(kind(), editor, consistency=consistency, mask=found.mask)
    assert torch.equal(again.latents, found.latents)
    assert again.mask is None


def test_a_frame_is_beside_two_or_at_the_end_itself() -> None:
    inner, whole = (automatic_mask.beside(range(*ends), range(1, 6)) for ends in ((3, 5), (1, 6)))
    assert inner.keyframes == (2, 3, 4, 5)
    assert inner.neighbours.tolist() == [[0, 2], [1, 3]]
    assert whole.keyframes == (1, 2, 3, 4, 5)
    assert whole.neighbours.tolist() == [[0, 1], [0, 2], [1, 3], [2, 4], [3, 4]]


@pytest.mark.parametrize("ranks", [1, 2, 4])  # of four ranks one has no window
def test_the_mask_holds_still_along_the_motion(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    maps = torch.zeros(FRAMES, 1, HEIGHT, WIDTH)
    for frame in range(FRAMES):
        maps[frame, :, 2:4, frame + 2 : frame + 4] = 1
    expected = torch.nn.functional.max_pool2d(maps, 3, stride=1, padding=1)
    maps[2, :, 0, 8] = 0.6  # in one frame alone

    def difference(sampling: Any, prompts: Conditioning, frames: range) -> Tensor:
        return maps[list(frames)]

    monkeypatch.setattr(automatic_mask, "difference", difference)

    def mask(group: FrameGroup) -> Tensor:
        return edited(GaussianFlow(), speed=1, ranks=group).mask.frames[:]

    for found in on_ranks(ranks, mask):
        assert torch.equal(found, expected.expand_as(found))
    monkeypatch.setattr(automatic_mask, "ROUNDS", 0)
    assert mask(FrameGroup())[2, 0, 0, 8] == 1


def test_all_frames_have_the_noise_of_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def parting(values: Tensor) -> float:
        seen.append(values)
        return 0.5

    monkeypatch.setattr(automatic_mask, "ROUNDS", 0)
    monkeypatch.setattr(automatic_mask, "parting", parting)
    model = WhereNoiseIs()
    times = list[float]()

    def on_step(stage: str, *_: int) -> None:
        times.extend([model.asked] if stage == "mask" else [])

    for seed in (0, 1):
        edited(model, seed=seed, on_step=on_step)
    assert set(times) == {0.5}  # where it is as strong as the signal
    one, other = seen
    assert torch.equal(one, one[:1].expand_as(one))  # as the frames are
    assert (one - other).abs().max() > 0.1


def test_an_edit_is_resumed_though_its_mask_may_round_otherwise(tmp_path: Path) -> None:
    store = ResumeStore(Cache(tmp_path), "PnP", "NNField")
    steps: dict[str, list[int]] = {"mask": [], "edit": []}

    def on_step(stage: str, step: int, _: int) -> Any:
        steps.setdefault(stage, []).append(step)
        return "stop" if (stage, steps["edit"]) == ("edit", [1, 2]) else None

    model = Somewhere()
    with pytest.raises(Preempted):
        edited(model, store=store, on_step=on_step)
    assert steps["mask"] == [1, 2, 3]  # two of five frames at once
    whole = edited(model, mask=None, store=store)  # another edit
    whole.checkpoint.remove()
    model.where = torch.zeros(HEIGHT, WIDTH)
    model.where[:, 4:7] = 1
    found = edited(model, store=store, on_step=on_step)
    assert steps["edit"] == [1, 2, 3, 4]
    assert found.mask.frames[0][0, 0, 7] == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompts": "0.9"}, "expected two prompts, that of the source is empty; say what"),
        ({"prompts": Prompts("0.4", "", " 0.4")}, "expected two prompts, both are '0.4'"),
        ({}, "differ nowhere, or everywhere alike: .* let the prompts differ more, or give a mask"),
    ],
)
def test_where_no_mask_can_be_found(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        edited(GaussianFlow(), **given)


def test_a_mask_of_nearly_everything_is_warned_of() -> None:
    model = Somewhere()
    model.where = torch.ones(HEIGHT, WIDTH)
    model.where[2, 5] = 0
    with pytest.warns(UserWarning, match=r"takes in 9\d% of the clip, .* leave the mask out"):
        edited(model)
