"""The source latents at the timesteps that sampling visits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from tokenflow.diffusion.sampling import Schedule
from tokenflow.storage.scratch import room


@dataclass(frozen=True)
class Trajectory:
    """What inversion leaves: `latents[i]` belongs to `timesteps[i]`, noisiest first.

    The latents have shape (steps, frames, c, h, w), in host memory or, of a long clip, in a file
    that is mapped into it; `clean` is the source's own
    code (frames, c, h, w), and `noisiest` the last latent that inversion reached, at
    `noisiest_alpha`, which lies beyond the first sampling timestep when inversion used more steps.
    Where several ranks share a clip, each has the latents of consecutive frames, from the `first`
    of `whole`.
    """

    timesteps: tuple[int, ...]
    latents: Float[Tensor, "steps frames c h w"]
    clean: Float[Tensor, "frames c h w"]
    noisiest: Float[Tensor, "frames c h w"]
    noisiest_alpha: float
    first: int = 0
    whole: int | None = None

    @classmethod
    def empty(
        cls,
        clean: Float[Tensor, "frames c h w"],
        schedule: Schedule,
        timesteps: Sequence[int],
        first: int = 0,
        whole: int | None = None,
    ) -> Trajectory:
        """One whose latents are still to be filled in, by `keep`, on the way up `timesteps`."""
        kept = schedule.timesteps
        return cls(
            timesteps=kept,
            latents=room(len(kept), *clean.shape),
            clean=clean,
            noisiest=torch.empty_like(clean),
            noisiest_alpha=schedule.alpha(timesteps[-1]),
            first=first,
            whole=whole,
        )

    def keep(self, t: int, here: Int64[Tensor, " some"], x: Float[Tensor, "some c h w"]) -> None:
        """Fills in the latents that inversion reached at `t`, of the frames with these numbers."""
        self.noisiest[here] = x.to(self.noisiest)
        if t in self.timesteps:
            self.latents[self.timesteps.index(t), here] = x.to(self.latents)

    def __len__(self) -> int:
        """The number of frames."""
        return self.latents.shape[1]

    @property
    def total(self) -> int:
        """How many frames the whole clip has."""
        return len(self) if self.whole is None else self.whole

    @property
    def positions(self) -> range:
        """Where these frames are in the whole clip."""
        return range(self.first, self.first + len(self))

    def at(
        self, t: int | None, frames: Sequence[int] | None = None
    ) -> Float[Tensor, "frames c h w"]:
        """The latents at timestep `t`, the clean ones for `None`, in host memory.

        `frames` are positions in the clip; all that are here when not given.
        """
        latents = self.clean if t is None else self.latents[self.timesteps.index(t)]
        return latents if frames is None else latents[rows(self.positions, frames)]


def rows(positions: range, frames: Sequence[int]) -> list[int]:
    """Where frames of a clip are among those at consecutive positions.

    Raises:
        IndexError: One is not there, which several ranks may have shared out.
    """
    for frame in frames:
        if frame not in positions:
            raise IndexError(
                f"frame {frame} of the clip is not among those here, {positions[0]} to "
                f"{positions[-1]}; use only the frames that you are given"
            )
    return [positions.index(frame) for frame in frames]
