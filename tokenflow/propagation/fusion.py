"""Fusion of predictions: each frame takes a share of what its keyframes predict, moved by flow.

Propagation ties the outputs of self-attention to the source's motion; what convolutions and
cross-attention add differs from frame to frame. Fusion ties the predicted clean latents themselves.
The source tells where flow can be trusted: where its own latents, moved alike, are the frame's.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from tokenflow.propagation.base import Window
from tokenflow.propagation.flow.base import inside, smooth, warp

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
    restored: float = 0.0,
) -> Float[Tensor, "frames c h w"]:
    """Frames' predicted clean latents, with a share of their neighbouring keyframes'.

    A frame's pixel takes strength · b · trust of either neighbour, b the neighbour's blend weight,
    and keeps the rest of its own. The trust is exp(-(d / `DIFFERENCE`)²) with d the difference of
    the source's latents, and 0 where flow leads out of the frame. Means of what does not quite fit
    have weaker details than what is mixed, in each frame and channel; a share of that is restored.
    All of it, step after step, makes edges too strong.

    Args:
        clean: Of the window's frames.
        keys: Of the window's keyframes.
        source: The source's clean latents of the frames.
        source_keys: And of the keyframes.
        window: Positions, neighbours, blend weights, and motion at the latents' size.
        strength: From 0, which changes nothing, to 1.
        restored: Share of the details' lost strength that they are given back, on a logarithmic
            scale.
    """
    both = torch.cat([keys, details(keys).square()], dim=1)
    share, moved = arrived(both, source, source_keys, window, strength)
    values, powers = moved.tensor_split(2, dim=2)
    fused = mixed(clean, values, share)
    own = details(fused)
    power = own.square().mean(dim=(2, 3), keepdim=True).clamp(min=1e-12)
    powers = powers.clamp(min=0)  # bicubic weights are signed
    wanted = mixed(details(clean).square(), powers, share).mean(dim=(2, 3), keepdim=True)
    gain = ((wanted / power) ** (restored / 2)).clamp(1, STRONGEST)
    return fused + (gain - 1) * own


def arrived(
    keys: Float[Tensor, "keyframes c h w"],
    source: Float[Tensor, "frames d h w"],
    source_keys: Float[Tensor, "keyframes d h w"],
    window: Window,
    strength: float,
) -> tuple[Float[Tensor, "frames 2 1 h w"], Float[Tensor, "frames 2 c h w"]]:
    """Of both neighbouring keyframes, the share that a frame's pixels take, and what arrives."""
    if window.motion is None:
        raise ValueError("fusion needs a window with motion, got one without")
    flow = window.motion.displacement.unflatten(2, source.shape[-2:]).movedim(-1, 2)
    both = torch.cat([keys, source_keys], dim=1)
    pairs = zip(window.neighbours.flatten().tolist(), flow.flatten(0, 1), strict=True)
    # bilinear sampling, step after step, would blur
    found = torch.stack([warp(both[k], there, "bicubic") for k, there in pairs])
    moved, source_moved = found.unflatten(0, (-1, 2)).tensor_split([keys.shape[1]], dim=2)
    difference = (source_moved - source[:, None]).square().mean(dim=2)
    # a pixel's neighbours are likely to have moved alike
    trust = torch.exp(-((smooth(difference) / DIFFERENCE) ** 2)) * inside(flow)
    return (strength * window.blend[..., None, None] * trust)[:, :, None], moved


def mixed(
    own: Float[Tensor, "frames c h w"],
    moved: Float[Tensor, "frames 2 c h w"],
    share: Float[Tensor, "frames 2 1 h w"],
) -> Float[Tensor, "frames c h w"]:
    """What arrives, each by its share, and for the rest the frames' own."""
    return (1 - share.sum(dim=1)) * own + (share * moved).sum(dim=1)


def details(values: Float[Tensor, "frames c h w"]) -> Float[Tensor, "frames c h w"]:
    """What a mean over 3×3 pixels takes away."""
    return values - smooth(values)
