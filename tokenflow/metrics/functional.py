"""Metrics as pure functions of tensors."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import grid_sample


def psnr(a: Float[Tensor, "*shape"], b: Float[Tensor, "*shape"]) -> float:
    """Peak signal-to-noise ratio in dB of two tensors of images in 0..1; infinite when equal."""
    return float(-10 * (a - b).square().mean().log10())


def warp(
    frames: Float[Tensor, "n channels height width"], flow: Float[Tensor, "n 2 height width"]
) -> Float[Tensor, "n channels height width"]:
    """Frames sampled bilinearly at p + flow(p), flow as (x, y) in pixels; the border repeats."""
    height, width = frames.shape[-2:]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    there = torch.stack((x, y)).to(flow) + flow
    size = torch.tensor([max(width - 1, 1), max(height - 1, 1)]).to(flow)
    grid = 2 * there.movedim(1, -1) / size - 1
    return grid_sample(frames, grid, padding_mode="border", align_corners=True)


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
    error = (warp(frames[1:], flow) - frames[:-1]).square().mean(dim=1)
    return float(error[visible].mean())
