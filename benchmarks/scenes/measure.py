"""What is measured of an edited clip whose true edit is known."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from benchmarks.scenes.suite import true_edit
from tokenflow.metrics import Motions, long_range, preservation, psnr, shown
from tokenflow.metrics.measures import MOST_DECIBELS
from tokenflow.miniature.edits import SceneEdit, SceneFlow
from tokenflow.miniature.judge import Judge
from tokenflow.miniature.scenes import VOCABULARY, Scene

DISTANCES = (1, 8)


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
        self.motions = SharedMotions(edit, scene)

    def measure(
        self, frames: Float[Tensor, "frames 3 height width"], judge: Judge
    ) -> dict[str, float | None]:
        """Every metric by its name; None where it does not apply."""
        kept = [name for name in VOCABULARY if name not in self.edit.changed]
        found: dict[str, float | None] = {}
        for distance in DISTANCES:
            consistency = long_range(frames, self.motions, distance)
            found[f"warp_error_{distance}"] = consistency and consistency.error
        for key, names in (("edited", self.edit.changed), ("kept", kept)):
            found[key] = float(shown(judge, frames, self.edit.target, names).float().mean())
        found["psnr_inside"] = preservation(frames, self.frames, ~self.inside)
        of_object = "background" not in self.edit.changed
        found["psnr_outside"] = (
            preservation(frames, self.source.frames[:], ~self.outside) if of_object else None
        )
        found["psnr"] = psnr(frames, self.frames)
        # JSON has no infinity, and no NaN, which an error of nothing visible is
        return {
            k: None if v is None or math.isnan(v) else min(v, MOST_DECIBELS)
            for k, v in found.items()
        }


class SharedMotions(Motions):
    """The exact motion of a clip, visible where source and true edit show it alike.

    Two shapes have different outlines; between these the source's motion is not the edit's.
    """

    def __init__(self, edit: SceneEdit, truth: Scene) -> None:
        super().__init__(edit.clip, SceneFlow(edit.scene))
        self.scenes = edit.scene, truth

    def between(
        self, start: int, end: int
    ) -> tuple[Float[Tensor, "2 height width"], Bool[Tensor, "height width"]]:
        if (start, end) not in self.found:
            flow, other = (scene.flow(start, end) for scene in self.scenes)
            seen, also = (scene.visible(start, end) for scene in self.scenes)
            self.found[start, end] = flow, seen & also & (flow == other).all(dim=0)
        return self.found[start, end]
