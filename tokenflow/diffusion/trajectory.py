"""The source's latents at the noise levels that sampling visits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from tokenflow.diffusion.schedule import Schedule, Timestep
from tokenflow.storage.scratch import empty_or_memmap


@dataclass(frozen=True)
class Trajectory:
    """What inversion leaves: `latents[i]` is at level i of sampling's schedule, noisiest first.

    The latents have shape (steps, frames, c, h, w), in host memory or, of a long clip, in a
    memory-mapped file; without inversion there are none, (0, frames, c, h, w). `clean` is the
    source's own latent (frames, c, h, w), and `noisiest` the last latent that inversion reached,
    at the level `noisiest_signal`, `noisiest_noise`, which lies beyond sampling's first when
    inversion used more steps. Where several ranks share a clip, each has the latents of
    consecutive frames, from the `first` of `whole`.
    """

    timesteps: tuple[Timestep, ...]
    latents: Float[Tensor, "steps frames c h w"]
    clean: Float[Tensor, "frames c h w"]
    noisiest: Float[Tensor, "frames c h w"]
    noisiest_signal: float = 0.0
    noisiest_noise: float = 1.0
    first: int = 0
    whole: int | None = None

    @classmethod
    def empty(
        cls,
        clean: Float[Tensor, "frames c h w"],
        schedule: Schedule,
        inversion: Schedule | None,
        first: int = 0,
        whole: int | None = None,
    ) -> Trajectory:
        """One whose latents are still to be filled in, by `keep`; without inversion, none are."""
        steps = 0 if inversion is None else len(schedule)
        return cls(
            timesteps=schedule.timesteps,
            latents=empty_or_memmap(steps, *clean.shape),
            clean=clean,
            noisiest=torch.empty_like(clean),
            noisiest_signal=inversion.signal[0] if inversion is not None else 0.0,
            noisiest_noise=inversion.noise[0] if inversion is not None else 1.0,
            first=first,
            whole=whole,
        )

    def keep(
        self, t: Timestep, here: Int64[Tensor, " some"], x: Float[Tensor, "some c h w"]
    ) -> None:
        """Fills in the latents that inversion reached at `t`, of the frames with these numbers."""
        self.noisiest[here] = x.to(self.noisiest)
        if t in self.timesteps:
            self.latents[self.timesteps.index(t), here] = x.to(self.latents)

    def __len__(self) -> int:
        """The number of frames."""
        return len(self.clean)

    @property
    def size(self) -> tuple[int, int]:
        """A latent's height and width."""
        height, width = self.clean.shape[-2:]
        return height, width

    @property
    def total(self) -> int:
        """How many frames the whole clip has."""
        return len(self) if self.whole is None else self.whole

    @property
    def positions(self) -> range:
        """Where these frames are in the whole clip."""
        return range(self.first, self.first + len(self))

    def at(self, level: int, frames: Sequence[int] | None = None) -> Float[Tensor, "frames c h w"]:
        """The latents at a level of sampling, the clean ones after its last step, in host memory.

        `frames` are positions in the clip; all that are here when not given.

        Raises:
            IndexError: There is no such level, or the source was not inverted.
        """
        if level == len(self.timesteps):
            latents = self.clean
        elif level < len(self.latents):
            latents = self.latents[level]
        else:
            why = "the source was not inverted" if not len(self.latents) else "there is none"
            raise IndexError(f"no latents at level {level}: {why}")
        return latents if frames is None else latents[rows(self.positions, frames)]

    def source(self, frames: Sequence[int] | None = None) -> Source:
        """The source of some frames, by position in the clip; of all that are here by default."""
        return Source(self, tuple(self.positions if frames is None else frames))


@dataclass(frozen=True)
class Source:
    """The source's latents of some of a clip's frames, as an editor sees them.

    `frames` are their positions in the clip, whatever frames share a batch or a rank.
    """

    trajectory: Trajectory
    frames: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def clean(self) -> Float[Tensor, "frames c h w"]:
        """The frames' own latents."""
        return self.at(len(self.trajectory.timesteps))

    def at(self, level: int) -> Float[Tensor, "frames c h w"]:
        """The inverted latents at a level of sampling, the clean ones after its last step."""
        return self.trajectory.at(level, self.frames)

    @property
    def noise(self) -> Float[Tensor, "frames c h w"]:
        """The noise that the noisiest inverted latent implies.

        Raises:
            IndexError: The source was not inverted.
        """
        one = self.trajectory
        if not len(one.latents):
            raise IndexError("the source was not inverted: draw noise by frame_noise")
        noisiest = one.noisiest[rows(one.positions, self.frames)]
        return (noisiest - one.noisiest_signal * self.clean) / one.noisiest_noise


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
