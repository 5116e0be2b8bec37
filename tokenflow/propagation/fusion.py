"""Fusion of predictions: each frame takes a share of what its keyframes predict, moved by flow.

Propagation ties the outputs of self-attention to the source's motion; what convolutions and
cross-attention add differs from frame to frame. Fusion ties the predicted clean latents themselves.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import grid_sample

from tokenflow.propagation.base import Window

TRUST = 0.5
"""Inconsistency of flow, in latent pixels, at which a keyframe's weight has fallen to 1/e."""


def fuse(
    clean: Float[Tensor, "frames c h w"],
    keys: Float[Tensor, "keyframes c h w"],
    window: Window,
    strength: float,
) -> Float[Tensor, "frames c h w"]:
    """Frames' predicted clean latents, with a share of their neighbouring keyframes'.

    A frame's pixel takes strength · b · exp(-(e / `TRUST`)⁴) of either neighbour, where flow finds
    it there; b is the neighbour's blend weight and e the flow's forward-backward inconsistency. It
    keeps the rest of its own.

    Args:
        clean: Of the window's frames.
        keys: Of the window's keyframes.
        window: Positions, neighbours, blend weights, and motion at the latents' size.
        strength: From 0, which changes nothing, to 1.
    """
    if window.motion is None:
        raise ValueError("fusion needs a window with motion, got one without")
    size = clean.shape[-2:]
    moved, inside = warped(keys[window.neighbours], window.motion.displacement.unflatten(2, size))
    trust = torch.exp(-((window.motion.inconsistency.unflatten(2, size) / TRUST) ** 4)) * inside
    share = strength * window.blend[..., None, None] * trust
    own = 1 - share.sum(dim=1, keepdim=True)
    return own * clean + (share[:, :, None] * moved).sum(dim=1)


def warped(
    values: Float[Tensor, "frames two c h w"], displacement: Float[Tensor, "frames two h w xy"]
) -> tuple[Float[Tensor, "frames two c h w"], Float[Tensor, "frames two h w"]]:
    """Values where displacements lead, sampled bilinearly, and 1 where that is in the frame."""
    height, width = values.shape[-2:]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    there = torch.stack((x, y), dim=-1).to(displacement) + displacement
    limit = torch.tensor([width, height]).to(there) - 1
    inside = ((there >= -0.5) & (there <= limit + 0.5)).all(dim=-1)
    grid = 2 * there / limit.clamp(min=1) - 1
    flat = grid_sample(
        values.flatten(0, 1), grid.flatten(0, 1), padding_mode="border", align_corners=True
    )
    return flat.view_as(values), inside.to(values)
