"""Guidance in a part of the schedule: what it is at each step, and which branches run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tokenflow.diffusion import Backbone, Source, StableDiffusion
from tokenflow.editors import Editor, PnP, SDEdit, Step
from tokenflow.engine import Settings, SourceCache, edit_clip, edit_latents
from tokenflow.engine.resume import ResumeStore
from tokenflow.errors import InputError, Preempted
from tokenflow.propagation import NNField
from tokenflow.storage.cache import Cache
from tokenflow.testing.threads import on_ranks
from tokenflow.testing.tiny_edit import PROMPTS, TinyEdit
from tokenflow.video import Clip

PART = Settings(steps=4, keyframe_every=4, guidance=3.0, guidance_begin=0.25, guidance_end=0.75)
FUSED = replace(PART, fusion=0.8)  # also for an editor with an `advance` of its own
# float32 through four steps of a network, with sums in another order; measured 2e-6
ROUNDING = 2e-5


def latents(model: Backbone, clip: Clip, editor: Editor, settings: Settings, **options: Any) -> Any:
    return edit_clip(model, clip, PROMPTS, editor, NNField(), settings, **options).latents


class Asked(PnP):
    """PnP with an `advance` of its own, which keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.given: dict[int, tuple[float, tuple[str, ...]]] = {}

    def advance(
        self, x: Tensor, outputs: Mapping[str, Tensor], step: Step, source: Source
    ) -> Tensor:
        self.given[step.index] = step.guidance, tuple(outputs)
        return super().advance(x, outputs, step, source)


def test_the_scale_is_1_outside_of_its_part(backbone: Backbone, clip: Clip) -> None:
    editor = Asked()
    own = latents(backbone, clip, editor, FUSED)
    every = ("source", "negative", "prompt")  # an editor that may use them has them all
    assert editor.given == {i: (g, every) for i, g in enumerate((1.0, 3.0, 3.0, 1.0))}
    # where the negative branch is left out, the result is the same
    assert torch.allclose(latents(backbone, clip, PnP(), FUSED), own, rtol=0, atol=ROUNDING)
    whole = latents(backbone, clip, PnP(), replace(FUSED, guidance_begin=0.0, guidance_end=1.0))
    assert (whole - own).abs().max() > 100 * ROUNDING


@pytest.mark.parametrize("consistency", ["tokenflow", "joint", "none"])
def test_steps_without_guidance_have_a_branch_fewer(
    backbone: StableDiffusion, clip: Clip, consistency: Any
) -> None:
    settings = replace(PART, consistency=consistency, keyframe_every=9, batch=9)
    rows: list[int] = []
    hook = backbone.unet.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    latents(backbone, clip, SDEdit(1.0), settings)
    hook.remove()
    passes = {"tokenflow": (1, 8)}.get(consistency, (9,))
    expected = [branches * n for branches in (2, 3, 3, 2) for n in passes]
    assert rows == [*[9] * 4, *expected]  # inversion, then sampling


def test_with_a_cached_source_one_branch_is_left(backbone: StableDiffusion, clip: Clip) -> None:
    cache, rows = SourceCache(), list[int]()
    settings = replace(PART, keyframe_every=9, batch=9)
    first = latents(backbone, clip, PnP(), settings, source_cache=cache)
    hook = backbone.unet.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    second = latents(backbone, clip, PnP(), settings, source_cache=cache)
    hook.remove()
    assert rows == [*[9] * 4, *[branches * n for branches in (1, 2, 2, 1) for n in (1, 8)]]
    assert torch.allclose(first, second, rtol=0, atol=ROUNDING)


def test_a_scale_of_1_needs_no_negative_prompt(backbone: Backbone, clip: Clip) -> None:
    alone = replace(FUSED, guidance=1.0, guidance_begin=0.0, guidance_end=1.0)
    expected = latents(backbone, clip, Asked(), alone)
    assert torch.allclose(latents(backbone, clip, PnP(), alone), expected, rtol=0, atol=ROUNDING)
    nowhere = replace(FUSED, guidance_begin=0.5, guidance_end=0.5)
    assert torch.equal(
        latents(backbone, clip, PnP(), nowhere), latents(backbone, clip, PnP(), alone)
    )


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_an_interrupted_edit_is_resumed_bit_for_bit(
    backbone: Backbone, clip: Clip, tmp_path: Path, stop: int
) -> None:
    store = ResumeStore(Cache(tmp_path), "PnP()", "NNField()", 1)
    steps: list[int] = []

    def counted(stage: str, step: int, _: int) -> Any:
        steps.extend([step] if stage == "edit" else [])
        return "stop" if (stage, step) == ("edit", stop) and len(steps) == stop else None

    with pytest.raises(Preempted):
        latents(backbone, clip, PnP(), PART, store=store, on_step=counted)
    again = latents(backbone, clip, PnP(), PART, store=store, on_step=counted)
    assert steps == [1, 2, 3, 4]
    assert torch.equal(again, latents(backbone, clip, PnP(), PART))


def test_two_ranks_agree_with_one(backbone: Backbone) -> None:
    settings = replace(
        PART, steps=2, keyframe_every=2, batch=1, guidance_begin=0.5, guidance_end=1.0
    )
    whole = TinyEdit.of(PnP(), backbone)
    total = whole.trajectory.total
    halves = range(total // 2), range(total // 2, total)
    tinies = [TinyEdit.of(PnP(), backbone) for _ in halves]

    def edit(tiny: TinyEdit, **options: Any) -> Tensor:
        return edit_latents(
            tiny.model, tiny.trajectory, tiny.schedule, PROMPTS, tiny.editor, NNField(), settings,
            **options,
        )  # fmt: skip

    parts = on_ranks(
        2, lambda ranks: edit(tinies[ranks.rank].part(halves[ranks.rank]), ranks=ranks)
    )
    assert torch.allclose(torch.cat(parts), edit(whole), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(
    ("begin", "end"), [(-0.1, 1.0), (0.0, 1.1), (0.6, 0.5), (0.0, float("nan"))]
)
def test_a_part_that_is_none(begin: float, end: float) -> None:
    with pytest.raises(InputError, match="guidance_begin and guidance_end must be shares"):
        Settings(guidance_begin=begin, guidance_end=end)
