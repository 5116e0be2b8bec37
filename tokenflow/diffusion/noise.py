"""Gaussian noise that does not depend on which frames share a batch or a rank."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def frame_noise(
    seed: int, frame: int, shape: Sequence[int], step: int | None = None, draw: int = 0
) -> Float[Tensor, "c h w"]:
    """Standard normal noise of one latent, from a seed, a frame's position in the clip and a step.

    Equal arguments give equal noise, on every machine; it is in host memory, in float32.

    Args:
        seed: `Step.seed`, or the one that `Editor.start` is given.
        frame: The position in the clip, one of `Source.frames`.
        shape: Of the latent, (c, h, w).
        step: `Step.index`, for other noise at every step.
        draw: The number of the draw, from 0, where a step draws several times.
    """
    words = f"{seed}/{frame}" if step is None else f"{seed}/{frame}/{step}"
    words += f"/{draw}" if draw else ""
    digest = hashlib.sha256(words.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.randn(*shape, generator=generator)
