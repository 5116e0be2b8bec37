"""Edits with fused predictions: on by default, the same on ranks and after an interruption."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.gaussian_noise import GaussianNoise
from tests.plugins_by_others.no_inversion import NoInversion
from tokenflow.diffusion import Backbone, Source
from tokenflow.editors import DDCM, Editor, FlowEdit, PnP, Prompts, SDEdit, Step
from tokenflow.engine import Settings, SourceCache, edit_clip, edit_latents
from tokenflow.engine.fusion import RESTORED, chained, voted
from tokenflow.engine.keyframes import split_windows
from tokenflow.engine.ranks.group import FrameGroup
from tokenflow.engine.resume import ResumeStore
from tokenflow.engine.sampling import Sampling
from tokenflow.errors import InputError, Preempted
from tokenflow.propagation import (
    FlowWeighted,
    LatentFlow,
    Motion,
    NNField,
    OpticalFlow,
    Propagation,
    Window,
)
from tokenflow.propagation.fusion import fuse
from tokenflow.storage.cache import Cache
from tokenflow.testing.threads import on_ranks
from tokenflow.testing.tiny_edit import PROMPTS, StillFlow, TinyEdit
from tokenflow.video import Clip

FUSED = Settings(steps=4, keyframe_every=4, fusion=0.5)
# float32 through some steps of a network, with sums in another order; measured 2.1e-5
ROUNDING = 4e-5


def latents(
    model: Backbone,
    clip: Clip,
    settings: Settings,
    editor: Editor | None = None,
    kernel: Propagation | None = None,
    **options: Any,
) -> Tensor:
    editor, kernel = editor or PnP(), kernel or NNField()
    return edit_clip(model, clip, PROMPTS, editor, kernel, settings, **options).latents


def test_it_is_on_by_default_where_keyframes_are_propagated(backbone: Backbone, clip: Clip) -> None:
    default = replace(FUSED, fusion=None)
    plain = latents(backbone, clip, replace(FUSED, fusion=0.0))
    fused = latents(backbone, clip, replace(FUSED, fusion=0.8))
    assert (fused - plain).abs().max() > 100 * ROUNDING
    assert torch.equal(latents(backbone, clip, default), fused)
    for way in ("joint", "none"):
        edited = edit_clip(
            backbone, clip, PROMPTS, PnP(), NNField(), replace(default, consistency=way)
        )  # fmt: skip
        assert edited.settings.fusion == 0
    without_inversion = edit_clip(backbone, clip, PROMPTS, FlowEdit(1), NNField(), default)
    assert without_inversion.settings.fusion == 0


def test_it_is_off_by_default_where_an_editor_has_a_step_of_its_own(
    backbone: Backbone, clip: Clip
) -> None:
    class Keeping(PnP):
        """Keeps the left half of the source."""

        def advance(
            self, x: Tensor, outputs: Mapping[str, Tensor], step: Step, source: Source
        ) -> Tensor:
            edited = super().advance(x, outputs, step, source)
            left = torch.arange(x.shape[-1]) < x.shape[-1] // 2
            return source.at(step.index + 1).where(left, edited)

    for share, expected in ((None, 0.0), (0.8, 0.8)):
        settings = replace(FUSED, fusion=share, inversion_steps=4)
        result = edit_clip(backbone, clip, "0.5", Keeping(), NNField(), settings)
        assert result.settings.fusion == expected


def test_it_is_off_by_default_where_there_is_no_flow(backbone: Backbone) -> None:
    tiny = TinyEdit.of(PnP(), backbone)
    given = tiny.model, tiny.trajectory, tiny.schedule, PROMPTS, tiny.editor, NNField()
    without, off = (edit_latents(*given, replace(FUSED, fusion=share)) for share in (None, 0.0))
    assert torch.equal(without, off)
    # frames too small for optical flow
    few = Clip.from_frames(torch.rand(3, 3, 4, 6))
    network, settings = GaussianNoise(), Settings(steps=1, keyframe_every=3)
    result = edit_clip(network, few, Prompts("0.5"), SDEdit(), NNField(), settings)
    assert result.settings.fusion == 0
    with pytest.raises(InputError, match="DIS needs frames of 12x12 pixels or more, got 4x6"):
        edit_clip(
            network, few, Prompts("0.5"), SDEdit(), NNField(), replace(settings, fusion=0.8)
        )  # fmt: skip


def test_frames_that_are_equal_stay_equal(backbone: Backbone) -> None:
    still = Clip.from_frames(torch.rand(1, 3, 16, 32).expand(9, -1, -1, -1))
    settings = replace(FUSED, fusion=1.0)
    found = latents(backbone, still, settings)
    # what keyframes predict is then what every frame does
    expected = latents(backbone, still, replace(settings, fusion=0.0))
    # a joint pass of keyframes rounds otherwise than a pass of frames; measured 2.6e-5
    assert torch.allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("keyframe_every", [4, 2])
def test_frames_of_a_still_source_become_alike(backbone: Backbone, keyframe_every: int) -> None:
    """Their noise differs, and one keyframe's prediction is taken by all, of two windows, too."""
    still = Clip.from_frames(torch.rand(1, 3, 16, 32).expand(4, -1, -1, -1))
    settings = Settings(steps=2, keyframe_every=keyframe_every, fusion=1.0)

    def spread(**options: float) -> float:
        editor = SDEdit(1.0, noise="independent")
        return float(latents(backbone, still, replace(settings, **options), editor).std(0).max())

    assert spread() < spread(fusion=0.0) / 20  # measured 0.07 and 3.7


@pytest.mark.parametrize(
    "editor", [SDEdit(0.75, "shared"), NoInversion()], ids=["sdedit", "no inversion"]
)
@pytest.mark.parametrize("kernel", [NNField(), FlowWeighted()], ids=["nn", "flow"])
def test_every_editor_and_kernel(
    backbone: Backbone, clip: Clip, editor: Editor, kernel: Propagation
) -> None:
    fused, plain = (
        latents(backbone, clip, replace(FUSED, fusion=share), editor, kernel)
        for share in (0.5, 0.0)
    )
    assert fused.isfinite().all()
    assert (fused - plain).abs().max() > 100 * ROUNDING


def test_a_second_edit_without_the_source_is_the_same(backbone: Backbone, clip: Clip) -> None:
    cache = SourceCache()
    first, second = (latents(backbone, clip, FUSED, source_cache=cache) for _ in range(2))
    assert torch.allclose(first, second, rtol=0, atol=ROUNDING)


def test_an_interrupted_edit_is_resumed_bit_for_bit(
    backbone: Backbone, clip: Clip, tmp_path: Path
) -> None:
    store = ResumeStore(Cache(tmp_path), "PnP()", "NNField()", 1)
    taken: list[int] = []

    def counted(stage: str, step: int, _: int) -> Any:
        taken.extend([step] if stage == "edit" else [])
        return "stop" if (stage, step, len(taken)) == ("edit", 2, 2) else None

    with pytest.raises(Preempted):
        latents(backbone, clip, FUSED, store=store, on_step=counted)
    again = latents(backbone, clip, FUSED, store=store, on_step=counted)
    assert taken == [1, 2, 3, 4]
    assert torch.equal(again, latents(backbone, clip, FUSED))
    # another strength is another edit
    latents(backbone, clip, replace(FUSED, fusion=0.4), store=store, on_step=counted)
    assert taken == [1, 2, 3, 4, 1, 2, 3, 4]


@pytest.mark.parametrize(("attention", "span"), [("full", 1), ("windowed", 2), ("windowed", 8)])
def test_two_ranks_agree_with_one(backbone: Backbone, attention: Any, span: int) -> None:
    settings = replace(FUSED, steps=2, keyframe_every=1, keyframe_attention=attention, span=span)
    whole = TinyEdit.of(PnP(), backbone)
    total = whole.trajectory.total
    halves = range(total // 2), range(total // 2, total)
    tinies = [TinyEdit.of(PnP(), backbone) for _ in halves]
    source = Clip.from_frames(torch.rand(total, 3, 16, 32))

    def edit(tiny: TinyEdit, **options: Any) -> Tensor:
        flow = LatentFlow(source, backbone.latent_scale)
        return edit_latents(
            tiny.model, tiny.trajectory, tiny.schedule, PROMPTS, tiny.editor, NNField(), settings,
            flow=flow, **options,
        )  # fmt: skip

    parts = on_ranks(
        2, lambda ranks: edit(tinies[ranks.rank].part(halves[ranks.rank]), ranks=ranks)
    )
    assert torch.allclose(torch.cat(parts), edit(whole), rtol=0, atol=ROUNDING)


def test_outside_of_a_mask_the_source_stays(backbone: Backbone, clip: Clip) -> None:
    mask = torch.zeros(1, 3, *clip.frames.shape[-2:])
    mask[..., :16] = 1
    result = edit_clip(
        backbone, clip, PROMPTS, PnP(), NNField(), FUSED, mask=Clip.from_frames(mask)
    )
    assert torch.equal(result.clip.frames[..., 16:], clip.frames[..., 16:])
    kept = backbone.encode(clip.frames)[..., 16 // backbone.latent_scale :]
    outside = result.latents[..., 16 // backbone.latent_scale :]
    assert torch.allclose(outside, kept, rtol=0, atol=ROUNDING)  # encoded in other batches


def test_latents_alone_need_the_clips_flow(backbone: Backbone) -> None:
    tiny = TinyEdit.of(PnP(), backbone)
    with pytest.raises(InputError, match="fusion needs the clip's optical flow, got none; give"):
        edit_latents(
            tiny.model, tiny.trajectory, tiny.schedule, PROMPTS, tiny.editor, NNField(), FUSED
        )


@pytest.mark.parametrize(("end", "on"), [(0.0, 0), (0.5, 1), (0.9, 1)])
def test_after_its_part_of_the_schedule_nothing_is_fused(
    backbone: Backbone, end: float, on: int
) -> None:
    def edit(fusion: float, fusion_end: float, **options: Any) -> Tensor:
        tiny = TinyEdit.of(PnP(), backbone)  # of two steps
        return edit_latents(
            tiny.model, tiny.trajectory, tiny.schedule, PROMPTS, tiny.editor, NNField(),
            replace(FUSED, fusion=fusion, fusion_end=fusion_end),
            flow=StillFlow(tiny.clip, backbone.latent_scale), **options,
        )  # fmt: skip

    begun = {} if on == 0 else {"x": edit(0.5, 1.0, last=on), "first": on}
    assert torch.equal(edit(0.5, end), edit(0.0, 1.0, **begun))
    assert not torch.equal(edit(0.5, end), edit(0.5, 1.0))


@pytest.mark.parametrize("wrong", [-0.1, 1.5])
def test_shares_that_are_none(wrong: float) -> None:
    with pytest.raises(InputError, match="fusion must be a share from 0 to 1"):
        Settings(fusion=wrong)
    with pytest.raises(InputError, match="fusion_end must be a share of the schedule from 0 to 1"):
        Settings(fusion_end=wrong)


class Still(OpticalFlow):
    """Nothing moves."""

    def between(self, clip: Clip, start: int, end: int) -> Tensor:
        return torch.zeros(2, *clip.frames.shape[-2:])


@pytest.mark.parametrize("editor", [DDCM(), FlowEdit(1), FlowEdit(1, n_min=1)])
def test_clean_latents_are_fused_as_they_are(editor: Editor) -> None:
    """Where nothing is edited an editor without inversion leaves the source to be fused."""
    # so alike that all of it is trusted
    frames = 0.5 + 0.1 * torch.rand(3, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    settings = Settings(steps=1, guidance=1.0, keyframe_every=3, keyframes="first", fusion=0.5)
    prompts = Prompts("0.5", inversion_prompt="0.5")

    def edited(chosen: Settings) -> Tensor:
        kernel = FlowWeighted(Still())
        return edit_clip(
            GaussianNoise(), Clip.from_frames(frames), prompts, editor, kernel, chosen
        ).latents

    alone = edited(replace(settings, fusion=0.0))
    # all of a frame's keyframes are the first
    first, still = torch.zeros(3, 2, dtype=torch.long), torch.zeros(3, 2, 24, 2)
    window = Window(
        (0, 1, 2), (0,), first, torch.tensor([[1.0, 0.0]]).expand(3, 2),
        motion=Motion(still, still[..., 0]),
    )  # fmt: skip
    same = torch.zeros_like(alone)
    expected = fuse(alone, alone[:1], same, same[:1], window, 0.5, RESTORED)
    assert torch.allclose(edited(settings), expected, rtol=0, atol=1e-5)
    assert (expected - alone).abs().max() > 0.01


def test_flow_is_chained_over_keyframes() -> None:
    """To each by hops to the one beside it, of which each begins where the last one ends."""
    hops = torch.zeros(4, 2, 2, 3, 12)
    for number in range(4):
        hops[number, 0, 0], hops[number, 1, 0] = -1 - number, 2 + number
    hops[2, 1, 0, :, :6] = 40  # where nothing comes by
    found = chained(hops, 1, [0, 1, 2, 3])
    assert found.shape == (4, 2, 3, 12)
    assert found[:, 0, 1, 3].tolist() == [-2, 0, 3, 3 + 4]
    assert not found[:, 1].any()
    assert chained(hops, 2, [1, 2, 3])[:, 0, 1, 7].tolist() == [-3, 0, 4]


class Shifted(StillFlow):
    """Everything moves by two latent pixels a frame."""

    def between(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        there, back = (x.clone() for x in super().between(start, end))
        there[0], back[0] = 2.0 * (end - start), 2.0 * (start - end)
        return there, back


class Covered(Shifted):
    """Frame 2's middle is hidden in the frames beside it, where flow leads elsewhere."""

    def between(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        both = super().between(start, end)
        if 2 in (start, end) and start != end:
            both[0 if start == 2 else 1][1, 2:6, 10:14] = 3.0
        return both


@pytest.mark.parametrize("flow", [Shifted, Covered])
def test_what_one_keyframe_alone_predicts_is_voted_out(flow: type[StillFlow]) -> None:
    clip = Clip.from_frames(torch.zeros(5, 3, 32, 96))
    sampling = object.__new__(Sampling)
    shard = FrameGroup().shard(split_windows(5, 1))
    for name, value in {
        "settings": FUSED, "ranks": FrameGroup(), "shard": shard, "flow": flow(clip, 4),
    }.items():  # fmt: skip
        object.__setattr__(sampling, name, value)
    picture = torch.rand(4, 8, 24, generator=torch.Generator().manual_seed(2))
    keys = torch.stack([picture.roll(2 * number, dims=2) for number in range(5)])
    source = keys.flip(1)
    wrong = keys.clone()
    wrong[2] += 3
    found = voted(sampling, wrong, source, range(5), 0)
    # what is given back to details is of whole pictures, with their borders
    torch.testing.assert_close(found[..., 8:16], keys[..., 8:16], rtol=0, atol=0.02)
    assert (voted(sampling, wrong[:2], source[:2], range(2), 0) == wrong[:2]).all()
