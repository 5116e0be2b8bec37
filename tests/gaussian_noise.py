"""The Gaussian model as one that predicts noise, on a schedule that preserves variance."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tests.gaussian_flow import GaussianFlow
from tokenflow.diffusion import Conditioning, Schedule


class GaussianNoise(GaussianFlow):
    """x = signal · x0 + noise · n; the output is E[n | x], with `share` of attention added."""

    def schedule(self, steps: int, size: tuple[int, int] | None = None) -> Schedule:
        angles = torch.linspace(1.5, 0, steps + 1, dtype=torch.float64).tolist()
        signal, noise = ([f(angle) for angle in angles] for f in (math.cos, math.sin))
        return Schedule(tuple(angles[:-1]), tuple(signal), tuple(noise), "epsilon")

    def predict(self, latents: Tensor, t: float, conditioning: Conditioning, **_: Any) -> Tensor:
        mean = conditioning["mean"].view(-1, 1, 1, 1)
        signal, noise = math.cos(t), math.sin(t)
        centred = latents - signal * mean
        output = noise / (signal**2 * self.std**2 + noise**2) * centred
        tokens = self.network["tokens"](latents.flatten(2).transpose(1, 2)).transpose(1, 2)
        return output + self.share * tokens.view_as(latents)
