"""Fusion of predictions: keyframes vote, and each frame takes a share of what they predict.

Propagation ties the outputs of self-attention to the source's motion; what convolutions and
cross-attention add differs from frame to frame. Fusion ties the predicted clean latents themselves,
along optical flow.
The source tells where flow can be trusted: where its own latents, moved alike, are the frame's, and
where the way there and back returns.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import one_hot

from tokenflow.propagation.base import Window
from tokenflow.propagation.flow.base import inside, smooth, warp
from tokenflow.propagation.flow.rematch import LOST

DIFFERENCE = 0.5
"""Mean squared difference of the source's latents at which a keyframe's weight has fallen to 1/e;
two places that have nothing in common differ by about 2."""
TRUSTED = 0.5
"""Trust in flow from which on a keyframe votes."""
PREFERENCE = 0.01
"""Of an earlier keyframe to the next, as a share of what it differs by from the others."""
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
    and keeps the rest of its own. What one neighbour does not show, where flow is lost (`LOST`) or
    leads out of the frame, has both weights in the other. The trust is exp(-(d / `DIFFERENCE`)²)
    with d the difference of the source's latents. Means of what does not quite fit
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
    return strengthened(clean, values, powers, share, restored)


def elected(
    keys: Float[Tensor, "voters c h w"],
    source: Float[Tensor, "voters d h w"],
    flows: Float[Tensor, "voters 2 h w"],
    own: int,
    restored: float = 0.0,
) -> Float[Tensor, "c h w"]:
    """A keyframe's predicted clean latents, of which several have voted on each pixel.

    A pixel takes from that keyframe whose prediction differs least from all others': the medoid of
    those that flow may be trusted from, if they are three or more. It takes as much of it as flow
    is trusted, and keeps the rest of its own. So what one keyframe alone has wrongly, beside an
    object or on it, goes, and details that do not fit are not averaged. Time grows as the square of
    the number of voters.

    Args:
        keys: Of three keyframes or more, its own among them.
        source: The source's clean latents of all.
        flows: From it to each.
        own: Its number among them.
        restored: As in `fuse`.
    """
    each = torch.cat([keys, details(keys).square(), source], dim=1)
    moved = torch.stack([warp(x, flow, "bicubic") for x, flow in zip(each, flows, strict=True)])
    values, powers, seen = moved.split([keys.shape[1], keys.shape[1], source.shape[1]], dim=1)
    trust = trusted(seen, source[own], flows)
    votes = trust >= TRUSTED
    differing = torch.stack([smooth((v - values).square().mean(dim=1)).sqrt() for v in values])
    # of groups as large as each other, all voters prefer the same, and no noise decides
    order = 1 + PREFERENCE * torch.arange(len(keys))[:, None, None]
    score = (order * (votes * differing).sum(dim=1)).masked_fill(~votes, torch.inf)
    best = torch.where(votes.sum(dim=0) > 2, score.argmin(dim=0), own)  # two have no majority
    share = trust * one_hot(best, len(keys)).movedim(-1, 0)
    return strengthened(
        keys[own, None], values[None], powers[None], share[None, :, None], restored
    )[0]


def strengthened(
    own: Float[Tensor, "frames c h w"],
    moved: Float[Tensor, "frames some c h w"],
    powers: Float[Tensor, "frames some c h w"],
    share: Float[Tensor, "frames some 1 h w"],
    restored: float,
) -> Float[Tensor, "frames c h w"]:
    """What is `mixed`, with a share of its details' lost strength; `powers` are their squares."""
    fused = mixed(own, moved, share)
    fine = details(fused)
    power = fine.square().mean(dim=(2, 3), keepdim=True).clamp(min=1e-12)
    powers = powers.clamp(min=0)  # bicubic weights are signed
    wanted = mixed(details(own).square(), powers, share).mean(dim=(2, 3), keepdim=True)
    gain = ((wanted / power) ** (restored / 2)).clamp(1, STRONGEST)
    return fused + (gain - 1) * fine


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
    trust = trusted(source_moved, source[:, None], flow)
    inconsistency = window.motion.inconsistency.unflatten(2, source.shape[-2:])
    visible = (inconsistency <= LOST) & (inside(flow) > 0)
    blend = window.blend[..., None, None]
    left = blend * visible
    # a keyframe that leads others has weights of 0, and keeps them
    left = left * blend.sum(dim=1, keepdim=True) / left.sum(dim=1, keepdim=True).clamp(min=1e-6)
    return (strength * left * trust)[:, :, None], moved


def trusted(
    moved: Float[Tensor, "*batch d h w"],
    source: Float[Tensor, "*#batch d h w"],
    flow: Float[Tensor, "*batch 2 h w"],
) -> Float[Tensor, "*batch h w"]:
    """How far flow is right, from 0 to 1: where what it brings of the source is the source."""
    difference = (moved - source).square().mean(dim=-3)
    # a pixel's neighbours are likely to have moved alike
    return torch.exp(-((smooth(difference) / DIFFERENCE) ** 2)) * inside(flow)


def mixed(
    own: Float[Tensor, "frames c h w"],
    moved: Float[Tensor, "frames some c h w"],
    share: Float[Tensor, "frames some 1 h w"],
) -> Float[Tensor, "frames c h w"]:
    """What arrives, each by its share, and for the rest the frames' own."""
    return (1 - share.sum(dim=1)) * own + (share * moved).sum(dim=1)


def details(values: Float[Tensor, "frames c h w"]) -> Float[Tensor, "frames c h w"]:
    """What a mean over 3×3 pixels takes away."""
    return values - smooth(values)
