"""Optical flow that moves latents, for kernels that have none: chained, refined, found again."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate

from tokenflow.propagation.clip_flow import ClipFlow, Flow, with_inconsistency
from tokenflow.propagation.flow.aperture import resolve_aperture
from tokenflow.propagation.flow.base import warp
from tokenflow.propagation.flow.dis import DIS, grey
from tokenflow.propagation.flow.rematch import rematched
from tokenflow.video import Clip

SMOOTHNESS, BRIGHTNESS = 15.0, 20.0
"""Weights of refinement, that of gradients being 10. OpenCV's own, 20 and 5, hold back what turns
and grows, as each frame's refinement is the next one's start (docs/benchmark.md)."""


class LatentFlow(ClipFlow):
    """Flow that moves latents where a kernel has none, for pairs of frames that are near.

    `DIS` measures neighbouring frames, at 4 pixels in a latent pixel; the part along edges, which
    small patches do not show, is estimated from a larger disc. For two frames further apart the
    flow to the frame before is composed with that frame's, and refined on the pictures, so that
    errors do not add up. Where flow over several frames is lost, as behind what passes, it leads to
    the patch most alike.

    Args:
        clip: Whose frames they are.
        scale: Pixels of a frame in a latent pixel.
    """

    def __init__(self, clip: Clip, scale: int) -> None:
        factor = next(n for n in range(max(1, scale // 4), 0, -1) if scale % n == 0)
        super().__init__(clip.reduced(factor), DIS(full=True), scale // factor)
        # with 2 pixels in a latent pixel
        side = next(n for n in (2, 3, self.scale) if self.scale % n == 0)
        self.pictures = self.clip.reduced(self.scale // side)

    def pair(self, start: int, end: int) -> tuple[Flow, Flow]:
        if start == end:
            return super().pair(start, end)
        for middle in range(start + 1, end):  # each is composed of the one before, which is kept
            self.between(start, middle)
        there, back = both_ways(self.one_way(start, end), self.one_way(end, start))
        if end - start > 1:
            one, other = self.pictures.frame(start), self.pictures.frame(end)
            there, back = both_ways(rematched(one, other, there), rematched(other, one, back))
        return there, back

    def one_way(self, start: int, end: int) -> Float[Tensor, "2 h w"]:
        """The flow from a frame to another, before what is lost is found again."""
        one, other = self.pictures.frame(start), self.pictures.frame(end)
        if abs(end - start) == 1:
            return resolve_aperture(one, other, self.reduced(self.measured(start, end)))
        middle = max(start, end) - 1
        first, then = (self.between(*two)[0][:2] for two in ((start, middle), (middle, end)))
        return refined(one, other, first + warp(then, first))


def both_ways(there: Float[Tensor, "2 h w"], back: Float[Tensor, "2 h w"]) -> tuple[Flow, Flow]:
    """Flow there and back, with what either misses."""
    return with_inconsistency(there, back), with_inconsistency(back, there)


def refined(
    one: Float[Tensor, "3 height width"],
    other: Float[Tensor, "3 height width"],
    flow: Float[Tensor, "2 h w"],
) -> Float[Tensor, "2 h w"]:
    """A flow that is nearly right, improved by what the two pictures show.

    By OpenCV's variational refinement, of Brox et al. 2004, "High Accuracy Optical Flow Estimation
    Based on a Theory for Warping".
    """
    import cv2  # late: `tokenflow --help` need not wait for it

    side = one.shape[-1] // flow.shape[-1]
    larger = interpolate(flow[None], one.shape[-2:], mode="bilinear")[0] * side
    search: Any = cv2.VariationalRefinement.create()
    search.setAlpha(SMOOTHNESS)
    search.setDelta(BRIGHTNESS)
    found = search.calc(grey(one), grey(other), larger.movedim(0, -1).contiguous().numpy())
    better = torch.from_numpy(found).movedim(-1, 0)
    return interpolate(better[None], flow.shape[-2:], mode="area")[0] / side
