"""Local edits: outside of a mask the source stays, for every editor, family, number of ranks."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.gaussian_flow import GaussianFlow
from tests.gaussian_noise import GaussianNoise
from tokenflow.diffusion import Backbone
from tokenflow.editors import DDCM, Editor, FlowEdit, PnP, Prompts, SDEdit
from tokenflow.engine import Settings, edit_clip
from tokenflow.engine.ranks.group import FrameGroup
from tokenflow.engine.region import Region
from tokenflow.engine.resume import ResumeStore
from tokenflow.errors import InputError, Preempted
from tokenflow.propagation import NNField
from tokenflow.storage.cache import Cache
from tokenflow.testing import tiny_clip
from tokenflow.testing.threads import on_ranks
from tokenflow.video import Clip

PROMPTS = Prompts("0.9", "-0.2", "0.4")
FRAMES = 5


def clip() -> Clip:
    generator = torch.Generator().manual_seed(0)
    return Clip.from_frames(torch.rand(FRAMES, 3, 4, 6, generator=generator))


def moving(like: Clip) -> Clip:
    """A white column that moves to the right."""
    mask = torch.zeros(like.frames.shape)
    for frame in range(len(like)):
        mask[frame, :, :, frame : frame + 2] = 1
    return Clip.from_frames(mask)


def edited(model: Backbone, editor: Editor, mask: Clip | None, **given: Any) -> Any:
    source, options = given.pop("clip", clip()), {"steps": 4, "keyframe_every": 2, "batch": 2}
    names = ("consistency", "mask_edge", "seed")
    options |= {name: given.pop(name) for name in names if name in given}
    return edit_clip(
        model, source, PROMPTS, editor, NNField(), Settings(**options), mask=mask, **given
    )


EDITORS = (
    PnP(0.5, 0.5), SDEdit(1.0), SDEdit(0.5, "independent"), FlowEdit(3), FlowEdit(4, n_min=2),
    DDCM(),
)  # fmt: skip


@pytest.mark.parametrize("editor", EDITORS)
@pytest.mark.parametrize("model", [GaussianFlow(share=0.1), GaussianNoise(share=0.1)])
def test_outside_of_the_mask_the_source_stays(model: Backbone, editor: Editor) -> None:
    mask, source = moving(clip()), clip().frames
    found = edited(model, editor, mask)
    outside = mask.frames == 0
    assert torch.equal(found.clip.frames[outside], source[outside])
    assert torch.equal(found.latents[outside], source[outside])
    assert ((found.clip.frames - source).abs()[~outside] > 1e-3).all()
    # what is inside sees the source around it, not another edit
    whole = edited(model, editor, None).latents
    assert not torch.allclose(found.latents[~outside], whole[~outside], atol=1e-4)
    everywhere = Clip.from_frames(torch.ones(1, 3, 4, 6))
    assert torch.equal(edited(model, editor, everywhere).latents, whole)


@pytest.mark.parametrize("consistency", ["none", "joint", "tokenflow"])
def test_a_real_networks_frames_stay_to_the_pixel(backbone: Backbone, consistency: str) -> None:
    """Latents are two pixels wide here: one is edited wherever a pixel of it may be."""
    source = tiny_clip(3)
    mask = torch.zeros(1, 3, *source.frames.shape[-2:])
    mask[:, :, 3:8, 5:20] = 1
    found = edited(
        backbone, SDEdit(1.0), Clip.from_frames(mask), clip=source, consistency=consistency
    )
    inside = mask.bool().expand_as(source.frames)
    assert torch.equal(found.clip.frames[~inside], source.frames[~inside])
    assert (found.clip.frames - source.frames)[inside].abs().max() > 0.1
    cells = torch.zeros(found.latents.shape, dtype=torch.bool)
    cells[:, :, 1:4, 2:10] = True
    clean = backbone.encode(source.frames)
    assert torch.allclose(found.latents[~cells], clean[~cells], rtol=0, atol=1e-6)
    assert (found.latents != clean)[cells].all()


def test_a_soft_edge_lies_inside_of_the_white() -> None:
    image = torch.zeros(1, 3, 9, 9)
    image[..., 2:7, 2:7] = 0.51  # a brighter grey is white
    image[..., 8, 8] = 0.5
    source = Clip.from_frames(torch.zeros(2, 3, 9, 9))
    hard, soft = (Region(Clip.from_frames(image), source, 1, edge) for edge in (0.0, 1.0))
    assert torch.equal(hard.opacity(1), (image[0, 0] > 0.5).float())
    assert soft.opacity(1)[4].tolist() == [0, 0, 0.5, 1, 1, 1, 0.5, 0, 0]
    halves = soft.composite(torch.ones(1, 3, 9, 9), torch.zeros(1, 3, 9, 9), [1])
    assert torch.equal(halves[0, 0], soft.opacity(1))


def test_two_ranks_are_as_one() -> None:
    model, mask = GaussianFlow(share=0.1), moving(clip())
    whole = edited(model, FlowEdit(3), mask)

    def edit(ranks: FrameGroup) -> tuple[Tensor, Tensor]:
        own = edited(GaussianFlow(share=0.1), FlowEdit(3), mask, ranks=ranks)
        return own.latents, own.clip.frames

    latents, frames = map(torch.cat, zip(*on_ranks(2, edit), strict=True))
    # float32 in batches of other sizes
    assert torch.allclose(latents, whole.latents, rtol=0, atol=1e-5)
    assert torch.allclose(frames, whole.clip.frames, rtol=0, atol=1e-5)


def test_an_edit_is_resumed_with_its_own_mask_alone(tmp_path: Path) -> None:
    store = ResumeStore(Cache(tmp_path), "FlowEdit", "NNField")
    model, first = GaussianFlow(share=0.1), moving(clip())
    other = Clip.from_frames(first.frames.flip(-1))

    def edit(mask: Clip, stop: int = 0, **given: Any) -> tuple[Tensor, list[int]]:
        seen: list[int] = []

        def on_step(stage: str, step: int, steps: int) -> Any:
            seen.extend([step] if stage == "edit" else [])
            return "stop" if (stage, step) == ("edit", stop) else None

        result = edited(model, FlowEdit(4), mask, on_step=on_step, store=store, **given)
        return result.latents, seen

    with pytest.raises(Preempted):
        edit(first, stop=2)
    assert edit(other)[1] == [1, 2, 3, 4]
    assert edit(first, mask_edge=2.0)[1] == [1, 2, 3, 4]
    resumed, seen = edit(first)
    assert seen == [3, 4]
    assert torch.equal(resumed, edited(model, FlowEdit(4), first).latents)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(4, 3, 4, 6), "mask of 6x4 with 1 frame or 5, .* got 6x4 with 4; cut and"),
        (torch.ones(1, 3, 4, 4), "expected a mask of 6x4 .* got 4x4 with 1"),
        (torch.full((1, 3, 4, 6), 0.4), "mask is black in every frame, .* expected white where"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(mask: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        edited(GaussianFlow(), PnP(), Clip.from_frames(mask))


def test_an_edge_below_0_is_refused() -> None:
    with pytest.raises(InputError, match="mask_edge must be a number of pixels, got -1"):
        Settings(mask_edge=-1.0)


def test_a_mask_of_the_shown_size_fits_frames_that_are_worked_on_in_another() -> None:
    source = dataclasses.replace(clip(), display_size=(8, 10))
    mask = torch.zeros(1, 3, 8, 10)
    mask[..., :4, :5] = 1
    region = Region(Clip.from_frames(mask), source, 1)
    expected = torch.zeros(4, 6, dtype=torch.bool)
    expected[:2, :3] = True
    assert torch.equal(region.white(3), expected)
