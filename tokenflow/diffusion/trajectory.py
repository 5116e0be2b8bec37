"""The source latents at the timesteps that sampling visits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Trajectory:
    """What inversion leaves: `latents[i]` belongs to `timesteps[i]`, noisiest first.

    The latents have shape (steps, frames, c, h, w), in host memory; `clean` is the source's own
    code (frames, c, h, w), and `noisiest` the last latent that inversion reached, at
    `noisiest_alpha`, which lies beyond the first sampling timestep when inversion used more steps.
    """

    timesteps: tuple[int, ...]
    latents: Float[Tensor, "steps frames c h w"]
    clean: Float[Tensor, "frames c h w"]
    noisiest: Float[Tensor, "frames c h w"]
    noisiest_alpha: float

    def __len__(self) -> int:
        """The number of frames."""
        return self.latents.shape[1]

    def at(self, t: int, frames: list[int] | None = None) -> Float[Tensor, "frames c h w"]:
        """The latents at timestep `t`, of all frames or those chosen, in host memory."""
        latents = self.latents[self.timesteps.index(t)]
        return latents if frames is None else latents[torch.tensor(frames)]
