"""SDEdit (Meng et al. 2022, arXiv 2108.01073): sampling starts late, from the noised source."""

from __future__ import annotations

from fractions import Fraction
from math import floor

import torch

from tokenflow.diffusion import Schedule, Source, frame_noise
from tokenflow.editors.base import Editor, Start
from tokenflow.errors import InputError

NOISES = ("inverted", "shared", "independent")


class SDEdit(Editor):
    """Starts from the noised source: the lower the denoising strength, the more of it is kept.

    Nothing of the source is injected later.

    Args:
        strength: Denoising strength, above 0 and up to 1: of N steps the last
            round(strength * N) run, halves up, and at least one. At 1 all run.
        noise: What the first latent is made of: "inverted" takes the source's inverted latent at
            the first timestep that runs, which keeps its structure best; "shared" adds to the
            source's clean latents noise that is the same for all frames, "independent" noise
            that is another for every frame.
    """

    def __init__(self, strength: float = 0.9, noise: str = "inverted") -> None:
        check_strength(strength)
        if noise not in NOISES:
            raise InputError(f"noise must be one of {', '.join(NOISES)}, got {noise!r}")
        self.strength, self.noise = strength, noise

    def start(self, source: Source, schedule: Schedule, seed: int) -> Start:
        first = len(schedule) - steps_to_run(self.strength, len(schedule))
        if self.noise == "inverted":
            return Start(source.at(first), first)
        clean = source.clean
        frames = [0] * len(source) if self.noise == "shared" else source.frames
        noise = torch.stack([frame_noise(seed, frame, clean.shape[1:]) for frame in frames])
        return Start(schedule.mix(clean, noise.to(clean), first), first)


def check_strength(strength: float) -> None:
    """Raises `InputError` unless it is above 0 and up to 1."""
    if isinstance(strength, bool) or not 0 < strength <= 1:
        raise InputError(
            f"strength is the share of the steps that run, above 0 and up to 1, got {strength}"
        )


def steps_to_run(strength: float, steps: int) -> int:
    """round(strength * steps), halves up, at least one; strength counts as it is written.

    In floating point 0.145 * 100 is 14.499999999999998, and would not round to 15.
    """
    return max(1, floor(Fraction(str(strength)) * steps + Fraction(1, 2)))
