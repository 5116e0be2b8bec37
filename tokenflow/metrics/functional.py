"""Metrics as pure functions of tensors."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokenflow.propagation.optical_flow import warp


def psnr(a: Float[Tensor, "*shape"], b: Float[Tensor, "*shape"]) -> float:
    """Peak signal-to-noise ratio in dB of two tensors of images in 0..1; infinite when equal."""
    return decibels(float((a - b).square().mean()))


def decibels(error: float) -> float:
    """The PSNR in dB of a mean squared error of images in 0..1; infinite for none."""
    return -10 * math.log10(error) if error > 0 else math.inf


def warp_error(
    frames: Float[Tensor, "frames channels height width"],
    flow: Float[Tensor, "frames-1 2 height width"],
    visible: Bool[Tensor, "frames-1 height width"],
) -> float:
    """Mean squared difference of each frame from the next one warped back to it.

    `flow[i]` leads from frame i to frame i + 1, and only pixels that are `visible` in both count.
    0 is perfect; a still or blank video is perfect too, so read it beside a measure of the edit.
    Source: Lai et al. 2018 (arXiv 1808.00449), here with the source's true motion for `flow`.
    """
    warped = torch.stack(list(map(warp, frames[1:], flow)))
    error = (warped - frames[:-1]).square().mean(dim=1)
    return float(error[visible].mean())
