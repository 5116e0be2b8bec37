"""Flow that is lost, as behind what passes, leads to the patch most alike."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate, pad, unfold

from tokenflow.propagation.flow.base import beside, targets, warp

LOST = 1.0
"""Flow is lost where it misses by so many of its pixels on the way there and back ..."""
FAR = 0.04
"""... or where what it leads to differs by this mean square, of values from 0 to 1."""
ALONE = 0.5
"""A patch is found if it differs by less than this share of what differs least of those more than
two pixels away: not one stripe among others."""
AT_ONCE = 2**22
"""Differences in memory at once."""


def rematched(
    one: Float[Tensor, "3 height width"],
    other: Float[Tensor, "3 height width"],
    flow: Float[Tensor, "3 h w"],
) -> Float[Tensor, "2 h w"]:
    """A flow that, where it is lost, leads to the patch of 3×3 of its pixels that is most alike.

    If each of the two is the other's nearest, and by far.

    Args:
        one: A picture, values from 0 to 1.
        other: Where its points have moved.
        flow: From one to the other, in its own pixels, each of as many of the pictures' on a side,
            and how far from each point the way there and back again ends.
    """
    (height, width), side = flow.shape[-2:], one.shape[-1] // flow.shape[-1]
    flow, inconsistency = flow[:2], flow[2]
    larger = interpolate(flow[None], one.shape[-2:], mode="bilinear")[0] * side
    differing = (one - warp(other, larger)).square().mean(dim=0, keepdim=True)
    missed = avg_pool2d(framed(differing, side), 3 * side, side).flatten()
    lost = (inconsistency.flatten() > LOST) | (missed > FAR)
    if not lost.any():
        return flow
    here, there = patches(one, side), patches(other, side)
    places = targets(torch.zeros_like(flow)).flatten(1)
    found = flow.flatten(1).clone()
    for pixels in lost.nonzero()[:, 0].split(max(1, AT_ONCE // len(there))):
        match, least = unambiguous(here[pixels], there, width)
        better = least < missed[pixels]
        pixels, match = pixels[better], match[better]
        again, least = unambiguous(there[match], here, width)
        mutual = (places[:, again] - places[:, pixels]).norm(dim=0) <= 1
        sure = mutual & least.isfinite()
        found[:, pixels[sure]] = (places[:, match] - places[:, pixels])[:, sure]
    return found.unflatten(1, (height, width))


def unambiguous(
    some: Float[Tensor, "n values"], others: Float[Tensor, "pixels values"], width: int
) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
    """Of a picture's patches that most alike, and by what mean square it differs.

    By infinity, if what is elsewhere in the picture, of so many pixels in a row, differs little
    more (`ALONE`).
    """
    differing = torch.cdist(some, others).square() / others.shape[1]
    least, match = differing.min(dim=1)
    near = beside(match, len(others) // width, width, 2)
    elsewhere = differing.scatter_(1, near, torch.inf).amin(dim=1)
    return match, least.where(least < ALONE * elsewhere, torch.inf)


def framed(picture: Float[Tensor, "c height width"], side: int) -> Float[Tensor, "1 c h w"]:
    """A picture with one more pixel of `side` by `side` all around."""
    return pad(picture[None], (side,) * 4, "replicate")


def patches(picture: Float[Tensor, "c height width"], side: int) -> Float[Tensor, "pixels values"]:
    """Of each pixel of `side` by `side`, what a picture shows in 3x3 of them around it."""
    return unfold(framed(picture, side), 3 * side, stride=side)[0].T
