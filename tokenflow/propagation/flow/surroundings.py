"""Flow that is lost, as behind what passes, continues the flow around it."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from tokenflow.propagation.flow.base import inside, smooth, warp
from tokenflow.propagation.flow.rematch import LOST

FAR = 0.25
"""Mean squared difference of latents from which on flow is lost, however consistent it is."""


def continued(
    one: Float[Tensor, "c h w"],
    other: Float[Tensor, "c h w"],
    flow: Float[Tensor, "3 h w"],
) -> Float[Tensor, "2 h w"]:
    """A flow that, where it is lost, continues the flow around, if that fits better.

    Args:
        one: Clean latents of one frame.
        other: Of another.
        flow: From one to the other, and how far from each point the way there and back again ends.
    """

    def missed(by: Float[Tensor, "2 h w"]) -> Float[Tensor, "h w"]:
        return smooth((one - warp(other, by)).square().mean(dim=0, keepdim=True))[0]

    flow, inconsistency = flow[:2], flow[2]
    before = missed(flow)
    lost = (inconsistency > LOST) | (before > FAR) | (inside(flow) == 0)
    if lost.all() or not lost.any():
        return flow
    around = filled(flow, ~lost)
    better = lost & (missed(around) < before) & (inside(around) > 0)
    return around.where(better, flow)


def filled(values: Float[Tensor, "c h w"], known: Bool[Tensor, "h w"]) -> Float[Tensor, "c h w"]:
    """Values, with those that are not known interpolated from coarser means of those that are.

    At least one must be known. By the pull and push of Gortler et al. 1996, "The Lumigraph".
    """
    if known.all():
        return values
    weight = known.to(values)[None]
    share, sums = (avg_pool2d(x, 2, ceil_mode=True) for x in (weight, weight * values))
    coarse = filled(sums / share.clamp(min=1e-6), share[0] > 0)
    return values.where(known, interpolate(coarse[None], values.shape[-2:], mode="bilinear")[0])
