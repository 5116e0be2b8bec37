"""Clips with known answers, and the same numbers always."""

from __future__ import annotations

import torch
from torch import Tensor


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Independent uniform numbers in 0..1."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def still(frames: int, height: int = 16, width: int = 20) -> Tensor:
    """One picture of noise, again and again."""
    return noise(3, height, width).expand(frames, -1, -1, -1).clone()


def translation(frames: int, height: int = 16, width: int = 20, step: int = 2) -> Tensor:
    """A picture of noise that moves `step` pixels to the left from frame to frame."""
    wide = noise(3, height, width + step * frames)
    return torch.stack([wide[..., step * i : step * i + width] for i in range(frames)])
