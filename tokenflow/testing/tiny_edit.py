"""One tiny edit for an editor to be checked in."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokenflow.diffusion import Backbone, Schedule, StableDiffusion, Trajectory
from tokenflow.editors import Batch, Editor, Prompts, Step
from tokenflow.engine import Settings, SourceCache, edit_latents
from tokenflow.engine.network import EditedNetwork
from tokenflow.engine.ranks.group import FrameGroup
from tokenflow.engine.settings import ConsistencyName
from tokenflow.propagation import ClipFlow, NNField
from tokenflow.testing.tiny import tiny_backbone, tiny_clip
from tokenflow.video import Clip

FRAMES, STEPS = 4, 2
PARTS = (range(1), range(1, FRAMES))
"""What ranks may have of the clip."""
PROMPTS = Prompts("a blue ball", "", "a ball")
GUIDANCE = 7.5


class Plain(Editor):
    """No editor at all, with the branches of another one."""

    interface = 2

    def __init__(self, editor: Editor) -> None:
        self.editor = editor

    def branches(self, prompts: Prompts) -> dict[str, str]:
        return dict(self.editor.branches(prompts))


class StillFlow(ClipFlow):
    """Nothing moves: what frames predict is fused all the same."""

    def __init__(self, clip: Clip, scale: int) -> None:
        self.clip, self.scale = clip, scale

    def between(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        height, width = self.clip.frames.shape[-2:]
        none = torch.zeros(3, height // self.scale, width // self.scale)
        return none, none


@dataclass(frozen=True)
class TinyEdit:
    """A model of its own, a clip, a trajectory as inversion would leave it, and latents."""

    editor: Editor
    model: Backbone
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
    ) -> TinyEdit:
        """Always the same for an editor, which is prepared for it by default.

        `dtype` is the model's, its own when not given; a `negated` one has another clip.
        """
        model = tiny_backbone() if model is None else copy.deepcopy(model)
        if dtype is not None and isinstance(model, StableDiffusion):
            for network in (model.unet, model.vae, model.text_encoder):
                nn.Module.to(network, dtype)  # diffusers' own warns
        clip = tiny_clip(FRAMES, model.multiple, 2 * model.multiple)
        clip = Clip.from_frames(1 - clip.frames[:]) if negated else clip
        clean = model.encode(clip.frames[:])
        schedule = model.schedule(STEPS, (clean.shape[2], clean.shape[3]))
        generator = torch.Generator().manual_seed(2)
        noise, x = torch.randn(2, *clean.shape, generator=generator)
        latents = torch.stack([schedule.mix(clean, noise, i) for i in range(STEPS)])
        levels = schedule.signal[0], schedule.noise[0]
        trajectory = Trajectory(schedule.timesteps, latents, clean, latents[0], *levels)
        if not editor.inverts:
            trajectory = dataclasses.replace(trajectory, latents=latents[:0])
        if prepare:
            editor.prepare(model, clip)
        return cls(editor, model, clip, schedule, trajectory, x)

    def part(self, frames: range, shown: range | None = None) -> TinyEdit:
        """What a rank that has these frames alone sees.

        The editor is prepared anew, for these frames or the more that are `shown`.
        """
        own, whole = slice(frames.start, frames.stop), self.trajectory
        trajectory = dataclasses.replace(
            whole, latents=whole.latents[:, own], clean=whole.clean[own],
            noisiest=whole.noisiest[own], first=frames.start, whole=FRAMES,
        )  # fmt: skip
        self.editor.prepare(self.model, self.clip.part(shown or frames))
        return dataclasses.replace(self, clip=self.clip.part(frames), trajectory=trajectory)

    def edit(
        self,
        batch: int = 3,
        consistency: ConsistencyName = "tokenflow",
        ranks: FrameGroup | None = None,
        prompts: Prompts = PROMPTS,
        source_cache: SourceCache | None = None,
    ) -> Float[Tensor, "frames c h w"]:
        """The edited latents of the clip, after a pass of inversion if the editor inverts."""
        if self.editor.inverts:
            self.source_output(STEPS - 1)
        settings = Settings(steps=STEPS, keyframe_every=2, batch=batch, consistency=consistency)
        return edit_latents(
            self.model, self.trajectory, self.schedule, prompts, self.editor, NNField(), settings,
            ranks=ranks, source_cache=source_cache,
            flow=StillFlow(self.clip, self.model.latent_scale),
        )  # fmt: skip

    @property
    def network(self) -> EditedNetwork:
        """The model's network under the editor."""
        return EditedNetwork(self.model, self.editor, PROMPTS)

    @property
    def plain(self) -> EditedNetwork:
        """The model's network with the editor's branches, but nothing else of it."""
        return EditedNetwork(self.model, Plain(self.editor), PROMPTS)

    def step(self, index: int) -> Step:
        """A step of sampling."""
        step = Step(index, self.schedule, GUIDANCE, 0, tuple(self.editor.branches(PROMPTS)))
        idle = self.editor.idle(step)
        return dataclasses.replace(
            step, branches=tuple(name for name in step.branches if name not in idle)
        )

    def source_batch(self, index: int) -> Batch:
        """A pass of the source's branch alone, as inversion makes it, of all frames."""
        frames, t = self.trajectory.positions, self.schedule.timesteps[index]
        source = self.batch(frames, index).latents[0]
        return self.network.source_batch(self.schedule, frames, source, t)

    def batch(self, frames: Sequence[int], index: int) -> Batch:
        """Sampling's pass of some frames."""
        step, here = self.step(index), [f - self.trajectory.first for f in frames]
        inputs = self.network.editor.inputs(self.x[here], step, self.trajectory.source(frames))
        return self.network.batch(inputs, frames, step)

    def source_output(self, index: int) -> Float[Tensor, "frames c h w"]:
        """The network's output in inversion's pass, under the editor's conditioning of it."""
        return self.network.run(self.source_batch(index))[0]

    def outputs(
        self, frames: Sequence[int], index: int, edited: bool = True
    ) -> Float[Tensor, "branches frames c h w"]:
        """Every branch's output in one pass, under the editor or as the network is by itself."""
        network = self.network if edited else self.plain
        with network.installed() if edited else nullcontext():
            return network.run(self.batch(frames, index))
