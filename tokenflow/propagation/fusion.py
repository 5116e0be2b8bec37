"""Fusion of predictions: each frame takes a share of what its keyframes predict, moved by flow.

Propagation ties the outputs of self-attention to the source's motion; what convolutions and
cross-attention add differs from frame to frame. Fusion ties the predicted clean latents themselves.
The source tells where flow can be trusted: where its own latents, moved alike, are the frame's.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import avg_pool2d

from tokenflow.propagation.base import Window
from tokenflow.propagation.flow.base import inside, warp

DIFFERENCE = 0.5
"""Mean squared difference of the source's latents at which a keyframe's weight has fallen to 1/e;
two places that have nothing in common differ by about 2."""
STRONGEST = 1.5
"""Gain of details at most: of frames that have nothing in common little more than noise is left."""


def fuse(
    clean: Float[Tensor, "frames c h w"],
    keys: Float[Tensor, "keyframes c h w"],
    source: Float[Tensor, "frames d h w"],
    source_keys: Float[Tensor, "keyframes d h w"],
    window: Window,
    strength: float,
) -> Float[Tensor, "frames c h w"]:
    """Frames' predicted clean latents, with a share of their neighbouring keyframes'.

    A frame's pixel takes strength · b · trust of either neighbour, b the neighbour's blend weight,
    and keeps the rest of its own. The trust is exp(-(d / `DIFFERENCE`)²) with d the difference of
    the source's latents, and 0 where flow leads out of the frame.

    Args:
        clean: Of the window's frames.
        keys: Of the window's keyframes.
        source: The source's clean latents of the frames.
        source_keys: And of the keyframes.
        window: Positions, neighbours, blend weights, and motion at the latents' size.
        strength: From 0, which changes nothing, to 1.
    """
    if window.motion is None:
        raise ValueError("fusion needs a window with motion, got one without")
    flow = window.motion.displacement.unflatten(2, clean.shape[-2:]).movedim(-1, 2)
    both = torch.cat([keys, source_keys], dim=1)
    pairs = zip(window.neighbours.flatten().tolist(), flow.flatten(0, 1), strict=True)
    # bilinear sampling, step after step, would blur
    arrived = torch.stack([warp(both[k], there, "bicubic") for k, there in pairs])
    moved, source_moved = arrived.unflatten(0, (-1, 2)).tensor_split([keys.shape[1]], dim=2)
    difference = (source_moved - source[:, None]).square().mean(dim=2)
    # a pixel's neighbours are likely to have moved alike
    trust = torch.exp(-((smooth(difference) / DIFFERENCE) ** 2)) * inside(flow)
    share = strength * window.blend[..., None, None] * trust
    own = 1 - share.sum(dim=1, keepdim=True)
    return own * clean + (share[:, :, None] * moved).sum(dim=1)


def as_detailed(
    fused: Float[Tensor, "frames c h w"], keys: Float[Tensor, "keyframes c h w"], window: Window
) -> Float[Tensor, "frames c h w"]:
    """Fused latents with details as strong, in each channel, as those of their keyframes.

    Means of what does not quite fit have less contrast, and every step would take more of it.
    """
    base = smooth(fused)
    details, (own, wanted) = fused - base, map(power, (fused, keys))
    wanted = (window.blend[..., None, None, None] * wanted[window.neighbours]).sum(dim=1)
    return base + (wanted / own.clamp_min(1e-12)).sqrt().clamp(1, STRONGEST) * details


def power(values: Float[Tensor, "frames c h w"]) -> Float[Tensor, "frames c 1 1"]:
    """The mean square of details, which a mean over 3×3 pixels takes away."""
    return (values - smooth(values)).square().mean(dim=(2, 3), keepdim=True)


def smooth(values: Float[Tensor, "frames c h w"]) -> Float[Tensor, "frames c h w"]:
    """Means over 3×3 pixels."""
    return avg_pool2d(values, 3, stride=1, padding=1, count_include_pad=False)
