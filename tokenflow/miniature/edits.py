"""Four edits of moving scenes, with everything that is true of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokenflow.editors import PnP, Prompts
from tokenflow.miniature.scenes import Attributes, Scene, random_scene
from tokenflow.propagation import OpticalFlow
from tokenflow.video import Clip

EDITOR = PnP(attention=0.5, features=0.3, feature_layers=5)
"""PnP for the miniature; docs/miniature.md explains the differences from the paper."""


@dataclass(frozen=True)
class SceneEdit:
    """A moving scene and what it is to become; `changed` names the edited attributes."""

    scene: Scene
    target: Attributes

    @property
    def changed(self) -> tuple[str, ...]:
        return self.scene.attributes.differing(self.target)

    @property
    def prompts(self) -> Prompts:
        """What the edit and the source show."""
        return Prompts(str(self.target), inversion_prompt=str(self.scene.attributes))

    @property
    def clip(self) -> Clip:
        """The source video."""
        name = "-".join([*str(self.target).split(), str(self.scene.texture)])
        return Clip.from_frames(self.scene.render(), name=name)

    @property
    def motion(self) -> tuple[Float[Tensor, "pairs 2 h w"], Bool[Tensor, "pairs h w"]]:
        """The exact flow from each frame to the next, and what stays visible."""
        pairs = [(i, i + 1) for i in range(len(self.scene) - 1)]
        flow = torch.stack([self.scene.flow(*pair) for pair in pairs])
        return flow, torch.stack([self.scene.visible(*pair) for pair in pairs])


def suite(frames: int = 24) -> list[SceneEdit]:
    """Two edits of colour and two of background, on held-out seeds."""
    edits = [
        (3_000_001, "a plain red ball on grass", "a plain blue ball on grass"),
        (3_000_002, "a striped yellow box on water", "a striped purple box on water"),
        (3_000_003, "a plain white star on brick", "a plain white star on sand"),
        (3_000_004, "a striped green ring on sand", "a striped green ring on water"),
    ]
    return [
        SceneEdit(random_scene(seed, frames, Attributes.parse(source)), Attributes.parse(target))
        for seed, source, target in edits
    ]


class SceneFlow(OpticalFlow):
    """The exact flow of a scene, for clips that were rendered from it.

    Args:
        scene: The scene.
    """

    measures_frames = False

    def __init__(self, scene: Scene) -> None:
        self.scene = scene

    def between(self, clip: Clip, start: int, end: int) -> Float[Tensor, "2 height width"]:
        return self.scene.flow(start, end, clip.frames.shape[-1])
