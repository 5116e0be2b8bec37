"""What is measured of an edited clip whose true edit is known."""

from __future__ import annotations

import math
from functools import cache

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from benchmarks.scenes.suite import true_edit
from tokenflow.metrics import VisibleFlow, judge_accuracy, long_range, psnr
from tokenflow.metrics.measures import MOST_DECIBELS
from tokenflow.miniature.edits import SceneEdit
from tokenflow.miniature.judge import Judge
from tokenflow.miniature.scenes import Scene

DISTANCES = (1, 8, 32)


class Truth:
    """A clip's true edit, by which edits of it are measured.

    Args:
        edit: The scene, and what it is to become.
    """

    def __init__(self, edit: SceneEdit) -> None:
        self.edit, self.source = edit, edit.clip
        scene = true_edit(edit)
        self.frames = scene.render()
        numbers = range(len(scene))
        masks = torch.stack([scene.mask(i) for i in numbers])
        before = torch.stack([edit.scene.mask(i) for i in numbers])
        self.inside = masks > 0.5
        # whatever neither of the two objects touches
        self.outside = (masks == 0) & (before == 0)
        self.flow = shared_flow(edit, scene)
        self.detail = detail(self.frames, self.inside)

    def measure(
        self, frames: Float[Tensor, "frames 3 height width"], judge: Judge
    ) -> dict[str, float | None]:
        """Every metric by its name; None where it does not apply."""
        found: dict[str, float | None] = {}
        for distance in DISTANCES:
            consistency = long_range(frames, self.flow, distance)
            found[f"warp_error_{distance}"] = consistency and consistency.error
        right = judge_accuracy(judge, frames, self.edit.scene.attributes, self.edit.target)
        found |= {kind: float(frame.float().mean()) for kind, frame in right.items()}
        found["psnr_inside"] = psnr(frames, self.frames, ~self.inside)
        of_object = "background" not in self.edit.changed
        found["psnr_outside"] = (
            psnr(frames, self.source.frames[:], ~self.outside) if of_object else None
        )
        found["psnr"] = psnr(frames, self.frames)
        found["sharpness"] = detail(frames, self.inside) / self.detail
        # JSON has no infinity, and no NaN, which an error of nothing visible is
        return {
            k: None if v is None or math.isnan(v) else min(v, MOST_DECIBELS)
            for k, v in found.items()
        }


def detail(
    frames: Float[Tensor, "frames 3 height width"], inside: Bool[Tensor, "frames height width"]
) -> float:
    """The mean absolute difference of neighbouring pixels, both inside: how sharp frames are."""
    steps, pairs = 0.0, 0
    for dim in (-1, -2):
        length = inside.shape[dim] - 1
        both = inside.narrow(dim, 0, length) & inside.narrow(dim, 1, length)
        steps += float((frames.diff(dim=dim).abs() * both[:, None]).sum())
        pairs += 3 * int(both.sum())
    return steps / pairs


def shared_flow(edit: SceneEdit, truth: Scene) -> VisibleFlow:
    """The exact flow of a clip, visible where source and true edit show it alike.

    Two shapes have different outlines; between these the source's motion is not the edit's.
    """

    @cache
    def between(start: int, end: int) -> tuple[Tensor, Tensor]:
        flow, other = (scene.flow(start, end) for scene in (edit.scene, truth))
        seen, also = (scene.visible(start, end) for scene in (edit.scene, truth))
        return flow, seen & also & (flow == other).all(dim=0)

    return between
