"""Flicker: how much of a video's change is quick."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from tokenflow.storage.scratch import empty_or_memmap
from tokenflow.video import Frames, luma

QUICK = 0.25
"""Cycles per frame, above which change is quick; 0.5 is the quickest there can be."""
FLOOR = (0.5 / 255) ** 2
"""Power of invisible changes: half a level of 256."""
LEAST = 4
"""Frames: quick and slow change of fewer cannot be distinguished."""


def flicker(frames: Float[Tensor, "frames 3 height width"] | Frames) -> float:
    """The share of the power of frame differences above 1/4 cycle per frame, in luma:

        Σ_{|ω| > 1/4} P(ω) / (Σ_ω P(ω) + (0.5/255)²),

    P the power over time of Y_{t+1} - Y_t, by the discrete Fourier transform and averaged over
    pixels; the constant keeps what is too faint to be seen from counting. No unit, 0..1: 0 for a
    static clip, 0.82 = (π + 2) / 2π for independent noise in each frame. Moving edges are quick,
    too: compare with the source's. Needs 4 frames or more. Blind to slow drift,
    to colour at equal brightness, and to how strong visible flicker is.
    Source: our own; the spectrum of white noise under a difference is 4 sin²(πω).
    """
    if len(frames) < LEAST:
        raise ValueError(f"expected {LEAST} frames or more, got {len(frames)}")
    brightness = empty_or_memmap(len(frames), *frames.shape[-2:])
    for number, frame in enumerate(frames):
        brightness[number] = luma(frame)
    count, quick, every = len(frames) - 1, 0.0, 0.0
    frequencies = torch.fft.fftfreq(count).abs()
    for row in brightness.unbind(dim=1):  # one row of pixels at a time, for memory
        power = torch.fft.fft(row.diff(dim=0), dim=0).abs().square().double().sum(dim=1)
        every, quick = every + float(power.sum()), quick + float(power[frequencies > QUICK].sum())
    pixels = count * count * brightness[0].numel()
    return (quick / pixels) / (every / pixels + FLOOR)
