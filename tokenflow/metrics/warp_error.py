"""Warp error: how much a video changes along the motion."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokenflow.propagation import warp


def squared_changes(
    frames: Float[Tensor, "frames channels height width"],
    flow: Float[Tensor, "frames-1 2 height width"],
) -> Float[Tensor, "frames-1 height width"]:
    """Mean over channels of the squared difference of each pixel from where flow takes it."""
    warped = torch.stack(list(map(warp, frames[1:], flow)))
    return (warped - frames[:-1]).square().mean(dim=1)


def warp_error(
    frames: Float[Tensor, "frames channels height width"],
    flow: Float[Tensor, "frames-1 2 height width"],
    visible: Bool[Tensor, "frames-1 height width"],
) -> float:
    """Mean squared difference of each frame from the next one warped back to it:

        mean over i, over visible p and over channels of (x_i(p) - x_{i+1}(p + flow_i(p)))².

    `flow[i]` leads from frame i to frame i + 1 of the source (or of the edit itself), in pixels.
    Unit: squared intensity, 0..1; 0 is perfect, two unrelated frames of uniform noise
    have 1/6. Blind to what is shown: a still or blurred video does well, so read it beside a
    measure of the edit, and beside the VAE's round trip of the source, below which no edit comes.
    Blind where nothing is visible in both frames.
    Source: Lai et al. 2018 (arXiv 1808.00449), equation 10, who sum over the three channels and so
    have three times as much; TokenFlow's paper multiplies by 1000.
    """
    return float(squared_changes(frames, flow)[visible].mean())
