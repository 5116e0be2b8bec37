"""One tiny edit for an editor to be watched in."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokenflow.diffusion import Backbone, Schedule, Trajectory
from tokenflow.editors import Edit, Editor, Pass, contract
from tokenflow.engine import Settings, edit_latents
from tokenflow.engine.attention import installed
from tokenflow.engine.denoising import BRANCHES, NAMES
from tokenflow.engine.ranks.group import FrameGroup
from tokenflow.engine.settings import Consistency
from tokenflow.propagation import NNField
from tokenflow.testing.checks import require_kept
from tokenflow.testing.tiny import tiny_backbone, tiny_clip
from tokenflow.video import Clip

FRAMES, STEPS = 4, 2
PARTS = (range(1), range(1, FRAMES))
"""What ranks may have of the clip."""
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
    def of(
        cls,
        editor: Editor,
        model: Backbone | None = None,
        prepare: bool = True,
        dtype: torch.dtype | None = None,
        negated: bool = False,
    ) -> Stage:
        """Always the same for an editor, which is prepared for it unless told otherwise.

        `dtype` is the model's, its own when not given; a `negated` stage has another clip.
        """
        backbone = tiny_backbone() if model is None else copy.deepcopy(model)
        if dtype is not None:
            for network in (backbone.unet, backbone.vae, backbone.text_encoder):
                nn.Module.to(network, dtype)  # diffusers' own warns
        clip = tiny_clip(FRAMES, backbone.multiple, 2 * backbone.multiple)
        clip = Clip.from_frames(1 - clip.frames[:]) if negated else clip
        schedule = backbone.schedule(STEPS)
        clean = backbone.encode(clip.frames[:])
        generator = torch.Generator().manual_seed(2)
        noise, x = torch.randn(2, *clean.shape, generator=generator)
        alphas = [schedule.alpha(t) for t in schedule.timesteps]
        latents = torch.stack([a**0.5 * clean + (1 - a) ** 0.5 * noise for a in alphas])
        trajectory = Trajectory(schedule.timesteps, latents, clean, latents[0], alphas[0])
        if prepare:
            editor.prepare(backbone, clip)
        return cls(editor, backbone, clip, schedule, trajectory, x)

    def part(self, frames: range, shown: range | None = None) -> Stage:
        """What a rank that has these frames alone sees.

        The editor is prepared anew, for these frames or the more that are `shown`.
        """
        own, whole = slice(frames.start, frames.stop), self.trajectory
        trajectory = dataclasses.replace(
            whole, latents=whole.latents[:, own], clean=whole.clean[own],
            noisiest=whole.noisiest[own], first=frames.start, whole=FRAMES,
        )  # fmt: skip
        self.editor.prepare(self.backbone, self.clip.part(shown or frames))
        return dataclasses.replace(self, clip=self.clip.part(frames), trajectory=trajectory)

    def edit(
        self,
        batch: int = 3,
        consistency: Consistency = "tokenflow",
        group: FrameGroup | None = None,
    ) -> Float[Tensor, "frames c h w"]:
        """The edited latents of the clip, as the engine finds them after a pass of inversion."""
        self.source_noise(self.schedule.timesteps[-1])
        settings = Settings(steps=STEPS, keyframe_every=2, batch=batch, consistency=consistency)
        return edit_latents(
            self.backbone, self.trajectory, self.schedule, self.editor, NNField(),
            PROMPTS[2], settings=settings, group=group,
        )  # fmt: skip

    def source_pass(self, t: int) -> Pass:
        """Inversion's pass of all frames."""
        source, text = self.trajectory.at(t), self.backbone.embed([PROMPTS[0]])
        frames = tuple(self.trajectory.positions)
        return Pass(("source",), frames, source[None], text, t, self.schedule.share(t))

    def sampling_pass(self, frames: Sequence[int], t: int) -> Pass:
        """Sampling's pass of some frames."""
        chosen = list(frames)
        branches = torch.stack([self.trajectory.at(t, chosen), self.x[chosen], self.x[chosen]])
        texts = self.backbone.embed(PROMPTS)
        return Pass(NAMES, tuple(chosen), branches, texts, t, self.schedule.share(t))

    def source_noise(self, t: int) -> Float[Tensor, "frames c h w"]:
        """The noise of all frames in inversion's pass, under the editor's conditioning of it."""
        return self.run(self.source_pass(t), conditioned=True)[0]

    def noise(
        self, frames: Sequence[int], t: int, edits: Sequence[Edit] | None
    ) -> Float[Tensor, "3 frames c h w"]:
        """Every branch's noise in one pass, with edits and conditioning, or with neither (None)."""
        with installed(edits or (), BRANCHES):
            return self.run(self.sampling_pass(frames, t), conditioned=edits is not None)

    def run(self, forward: Pass, conditioned: bool) -> Float[Tensor, "branches frames c h w"]:
        """The UNet's noise in a pass."""
        extra = self.editor.conditioning(forward) if conditioned else {}
        require_kept(contract.of_conditioning(extra, self.backbone.unet), "conditioning")
        x, t = forward.latents, forward.t
        texts = forward.embeddings.repeat_interleave(len(forward.frames), dim=0)
        noise = self.backbone.epsilon(x.flatten(0, 1), t, texts, self.schedule, **extra)
        return noise.unflatten(0, x.shape[:2])
