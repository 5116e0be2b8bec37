"""One tiny edit for an editor to be watched in."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tokenflow.diffusion import Backbone, Schedule, Trajectory
from tokenflow.editors import Edit, Editor, Pass
from tokenflow.engine import Settings, edit_latents
from tokenflow.engine.attention import installed
from tokenflow.engine.denoising import BRANCHES, NAMES
from tokenflow.propagation import NNField
from tokenflow.testing.tiny import tiny_backbone, tiny_clip
from tokenflow.video import Clip

FRAMES, STEPS = 4, 2
PROMPTS = ("a ball", "", "a blue ball")
"""Of inversion, the negative one, and the edit's."""


@dataclass(frozen=True)
class Stage:
    """A model of its own, a clip, a trajectory as inversion would leave it, and latents."""

    editor: Editor
    backbone: Backbone
    clip: Clip
    schedule: Schedule
    trajectory: Trajectory
    x: Float[Tensor, "frames c h w"]

    @classmethod
    def of(cls, editor: Editor, model: Backbone | None = None, prepare: bool = True) -> Stage:
        """Always the same for an editor, which is prepared for it unless told otherwise."""
        backbone = tiny_backbone() if model is None else copy.deepcopy(model)
        clip = tiny_clip(FRAMES, backbone.multiple, 2 * backbone.multiple)
        schedule = backbone.schedule(STEPS)
        clean = backbone.encode(clip.frames)
        generator = torch.Generator().manual_seed(2)
        noise, x = torch.randn(2, *clean.shape, generator=generator)
        alphas = [schedule.alpha(t) for t in schedule.timesteps]
        latents = torch.stack([a**0.5 * clean + (1 - a) ** 0.5 * noise for a in alphas])
        trajectory = Trajectory(schedule.timesteps, latents, clean, latents[0], alphas[0])
        if prepare:
            editor.prepare(backbone, clip)
        return cls(editor, backbone, clip, schedule, trajectory, x)

    def edit(self) -> Float[Tensor, "frames c h w"]:
        """The edited latents of the clip, as the engine finds them after a pass of inversion."""
        self.source_noise(self.schedule.timesteps[-1])
        return edit_latents(
            self.backbone, self.trajectory, self.schedule, self.editor, NNField(),
            PROMPTS[2], settings=Settings(steps=STEPS, keyframe_every=2, batch=3),
        )  # fmt: skip

    def source_noise(self, t: int) -> Float[Tensor, "frames c h w"]:
        """The noise of all frames in inversion's pass, under the editor's conditioning of it."""
        source, text = self.trajectory.at(t), self.backbone.embed([PROMPTS[0]])
        share, frames = self.schedule.share(t), tuple(range(FRAMES))
        forward = Pass(("source",), frames, source[None], text, t, share)
        extra = self.editor.conditioning(forward)
        texts = text.expand(FRAMES, -1, -1)
        return self.backbone.epsilon(source, t, texts, self.schedule, **extra)

    def noise(
        self, frames: Sequence[int], t: int, edits: Sequence[Edit] | None
    ) -> Float[Tensor, "3 frames c h w"]:
        """Every branch's noise in one pass, with edits and conditioning, or with neither (None)."""
        chosen = list(frames)
        source = self.trajectory.at(t, chosen)
        branches = torch.stack([source, self.x[chosen], self.x[chosen]])
        texts = self.backbone.embed(PROMPTS)
        extra = {}
        if edits is not None:
            share = self.schedule.share(t)
            forward = Pass(NAMES, tuple(chosen), branches, texts, t, share)
            extra = self.editor.conditioning(forward)
        x, repeated = branches.flatten(0, 1), texts.repeat_interleave(len(chosen), dim=0)
        with installed(edits or (), BRANCHES):
            noise = self.backbone.epsilon(x, t, repeated, self.schedule, **extra)
        return noise.unflatten(0, (BRANCHES, -1))
