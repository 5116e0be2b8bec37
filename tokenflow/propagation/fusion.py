"""Fusion of predictions: each frame takes a share of what its keyframes predict, moved by flow.

Propagation ties the outputs of self-attention to the source's motion; what convolutions and
cross-attention add differs from frame to frame. Fusion ties the predicted clean latents themselves.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from tokenflow.propagation.base import Window
from tokenflow.propagation.flow.base import inside, warp

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
    flow = window.motion.displacement.unflatten(2, size).movedim(-1, 2)
    pairs = zip(window.neighbours.flatten().tolist(), flow.flatten(0, 1), strict=True)
    moved = torch.stack([warp(keys[k], there) for k, there in pairs])
    trust = torch.exp(-((window.motion.inconsistency.unflatten(2, size) / TRUST) ** 4))
    share = strength * window.blend[..., None, None] * trust * inside(flow)
    own = 1 - share.sum(dim=1, keepdim=True)
    return own * clean + (share[:, :, None] * moved.view(-1, 2, *clean.shape[1:])).sum(dim=1)
