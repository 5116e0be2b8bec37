"""What one clip is sampled with."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from tokenflow.diffusion import Schedule, Trajectory
from tokenflow.diffusion.schedule import require_finite
from tokenflow.diffusion.trajectory import rows
from tokenflow.editors import Step
from tokenflow.engine.attention import Matcher
from tokenflow.engine.network import EditedNetwork
from tokenflow.engine.ranks.group import FrameGroup
from tokenflow.engine.ranks.shard import WindowShard
from tokenflow.engine.region import Region
from tokenflow.engine.settings import Settings
from tokenflow.engine.source_cache import SourceFeatures
from tokenflow.errors import InputError
from tokenflow.propagation import ClipFlow
from tokenflow.video import Clip

Latents = Float[Tensor, "own c h w"]
"""Of all frames that this rank has, in host memory."""
Outputs = Float[Tensor, "branches frames c h w"]
PASSES = 64
"""Forward passes whose outputs are in host memory at once."""


@dataclass(frozen=True)
class Sampling:
    """What one clip is sampled with; of a clip that ranks share, this rank's part.

    Attributes:
        network: The frozen network under the editor.
        trajectory: The source's latents.
        schedule: Sampling's noise levels.
        matcher: The kernel that finds correspondences.
        settings: How the clip is edited.
        name: The clip's: keyframes are drawn by it.
        shard: The clip's windows, and which of them this rank has.
        ranks: That share the clip.
        clip: The source's frames, of this rank's windows and of one more at each side; None where
            only latents are edited.
        flow: Optical flow of these frames, where predictions are fused.
        features: What edits take from the source's branch, at the step that runs.
        region: Where this rank's frames may be changed; everywhere if None.
    """

    network: EditedNetwork
    trajectory: Trajectory
    schedule: Schedule
    matcher: Matcher
    settings: Settings
    name: str
    shard: WindowShard
    ranks: FrameGroup
    clip: Clip | None = None
    flow: ClipFlow | None = None
    features: SourceFeatures = field(default_factory=SourceFeatures)
    region: Region | None = None

    @property
    def keyframes_once(self) -> bool:
        """Whether a keyframe's pass in its window would only repeat its joint pass.

        There its tokens take their own features. In "previous" they take the window before's as
        well; text in a sequence, and sites that are not matched, attend to all keyframes in a
        joint pass.
        """
        identity = self.matcher.kernel.identity_at_keyframes
        bracketing = self.settings.neighbours == "bracketing"
        return identity and bracketing and self.network.propagates_all

    def step(self, index: int) -> Step:
        """A step of sampling, as the editor sees it; what guidance does not need is left out."""
        guidance = self.settings.guidance_at(index, len(self.schedule))
        branches = self.network.branches_for(guidance)
        step = Step(index, self.schedule, guidance, self.settings.seed, branches)
        idle = self.network.editor.idle(step)
        return dataclasses.replace(step, branches=tuple(b for b in branches if b not in idle))

    def inputs(self, x: Latents, frames: Sequence[int], step: Step) -> Outputs:
        """The network's inputs for some of this rank's frames, by position in the clip.

        Without the source's branch where its features are cached; where it is the only one, x are
        its latents.
        """
        here = x[rows(self.trajectory.positions, frames)]
        if len(step.branches) == 1:
            return here[None]
        inputs = self.network.editor.inputs(here, step, self.trajectory.source(frames))
        return inputs[1:] if self.features.cached else inputs

    def advance(
        self,
        arriving: list[tuple[Sequence[int], Outputs]],
        x: Latents,
        following: Latents,
        step: Step,
    ) -> None:
        """Fills in the following latents of frames whose outputs arrive in host memory.

        An accelerator is waited for once, not after every pass; the list is emptied.
        """
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        for frames, outputs in arriving:
            here = rows(self.trajectory.positions, frames)
            following[here] = self.advanced(x[here], frames, outputs, step)
        arriving.clear()

    def advanced(self, x: Latents, frames: Sequence[int], outputs: Outputs, step: Step) -> Latents:
        """The following latents of some of this rank's frames, by their outputs in host memory."""
        names = step.branches[-len(outputs) :]  # without a source that is cached
        branches = dict(zip(names, outputs, strict=True))
        source = self.trajectory.source(frames)
        if "guidance" in self.network.prompts:  # embedded: the output is guided
            step = dataclasses.replace(step, guidance=1.0)
        return self.network.editor.advance(x, branches, step, source)

    def local(self, following: Latents, step: Step) -> Latents:
        """The following latents with the source's outside of the region."""
        if self.region is None:
            return following
        source = self.trajectory.source()
        kept = self.network.editor.kept(step, source)
        return self.region.within(following, kept, source.frames)

    def parts(self, frames: Sequence[int]) -> list[Sequence[int]]:
        """Runs of frames for one forward pass each."""
        batch = self.settings.batch
        return [frames[i : i + batch] for i in range(0, len(frames), batch)]

    def require_all(self, frames: set[int], way: str) -> None:
        """Raises an `InputError` where a way of consistency has left out frames."""
        if missing := set(self.trajectory.positions) - frames:
            raise InputError(
                f"{way}.outputs yielded nothing for frames {sorted(missing)}; it must yield every "
                f"frame of sampling.trajectory.positions once"
            )

    def require_finite(self, x: Latents, step: Step) -> None:
        """Raises a `DivergedError` on all ranks when a latent is NaN or infinite on one."""
        with self.ranks.together():
            require_finite(x, f"sampling at step {step.index} (timestep {step.t})")
