"""Optical flow that moves latents, for kernels that have none: chained, refined, found again."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate, pad, unfold

from tokenflow.propagation.clip_flow import ClipFlow, Flow, with_inconsistency
from tokenflow.propagation.flow.base import targets, warp
from tokenflow.propagation.flow.dis import DIS, grey
from tokenflow.video import Clip

LOST, FAR = 1.0, 0.04
"""Flow is lost where it misses by so many latent pixels on the way there and back, or where what it
leads to differs by this mean square, of values from 0 to 1."""
ALONE = 0.5
"""A patch is found if it differs by less than this share of what differs least of those more than
two latent pixels away: not one stripe among others."""
AT_ONCE = 2**22
"""Differences in memory at once."""


class LatentFlow(ClipFlow):
    """Flow that moves latents where a kernel has none, for pairs of frames that are near.

    `DIS` measures neighbouring frames. For two further apart the flow to the frame before is
    composed with that frame's, and refined on the pictures (variational refinement, OpenCV's, of
    Brox et al. 2004, "High Accuracy Optical Flow Estimation Based on a Theory for Warping"), so
    that errors do not add up. The pictures have 4 pixels, and 2 for refinement, in a latent pixel.
    Where flow over several frames is lost, as behind what passes, it leads to the patch of 3x3
    latent pixels that looks most alike, if each of the two is the other's nearest, and by far.

    Args:
        clip: Whose frames they are.
        scale: Pixels of a frame in a latent pixel.
    """

    def __init__(self, clip: Clip, scale: int) -> None:
        factor = next(n for n in range(max(1, scale // 4), 0, -1) if scale % n == 0)
        super().__init__(clip.reduced(factor), DIS(full=True), scale // factor)
        self.step = next(n for n in (2, 3, self.scale) if self.scale % n == 0)
        self.small = self.clip.reduced(self.scale // self.step)

    def pair(self, start: int, end: int) -> tuple[Flow, Flow]:
        if end - start <= 1:
            return super().pair(start, end)
        for middle in range(start + 1, end):  # each is composed of the one before, which is kept
            before = self.between(start, middle)
        there, back = (flow[:2] for flow in before)
        onward, homeward = (flow[:2] for flow in self.between(end - 1, end))
        there = self.refined(start, end, there + warp(onward, there))
        back = self.refined(end, start, homeward + warp(back, homeward))
        there, back = with_inconsistency(there, back), with_inconsistency(back, there)
        there, back = self.found_again(start, end, there), self.found_again(end, start, back)
        return with_inconsistency(there, back), with_inconsistency(back, there)

    def refined(self, start: int, end: int, flow: Float[Tensor, "2 h w"]) -> Float[Tensor, "2 h w"]:
        """A flow that is nearly right, improved by what the two frames show."""
        import cv2  # late: `tokenflow --help` need not wait for it

        one, other = (grey(self.small.frame(frame)) for frame in (start, end))
        (height, width), size = one.shape, flow.shape[-2:]
        pixels = torch.tensor([width / size[1], height / size[0]])[:, None, None]
        larger = interpolate(flow[None], (height, width), mode="bilinear")[0] * pixels
        found: Any = cv2.VariationalRefinement.create().calc(
            one, other, larger.movedim(0, -1).contiguous().numpy()
        )
        better = torch.from_numpy(found).movedim(-1, 0)
        return interpolate(better[None], size, mode="area")[0] / pixels

    def found_again(self, start: int, end: int, flow: Flow) -> Float[Tensor, "2 h w"]:
        """A flow that, where it is lost, leads to the patch most alike."""
        one, other = (self.small.frame(frame) for frame in (start, end))
        (height, width), step = flow.shape[-2:], self.step
        larger = interpolate(flow[None, :2], one.shape[-2:], mode="bilinear")[0] * step
        differing = (one - warp(other, larger)).square().mean(dim=0, keepdim=True)
        missed = avg_pool2d(framed(differing, step), 3 * step, step).flatten()
        lost = (flow[2].flatten() > LOST) | (missed > FAR)
        if not lost.any():
            return flow[:2]
        here, there = around(one, step), around(other, step)
        places = targets(torch.zeros_like(flow[:2])).flatten(1)
        found = flow[:2].flatten(1).clone()
        for pixels in lost.nonzero()[:, 0].split(max(1, AT_ONCE // len(there))):
            match, least = alone(here[pixels], there, width)
            better = least < missed[pixels]
            pixels, match = pixels[better], match[better]
            again, least = alone(there[match], here, width)
            mutual = (places[:, again] - places[:, pixels]).norm(dim=0) <= 1
            sure = mutual & least.isfinite()
            found[:, pixels[sure]] = (places[:, match] - places[:, pixels])[:, sure]
        return found.unflatten(1, (height, width))


def alone(
    patches: Float[Tensor, "n values"], others: Float[Tensor, "pixels values"], width: int
) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
    """Of a picture's others that most alike, and by what mean square it differs.

    By infinity, if what is elsewhere in the picture, of so many pixels in a row, differs little
    more (`ALONE`).
    """
    differing = torch.cdist(patches, others).square() / others.shape[1]
    least, match = differing.min(dim=1)
    near = beside(match, len(others) // width, width)
    elsewhere = differing.scatter_(1, near, torch.inf).amin(dim=1)
    return match, least.where(least < ALONE * elsewhere, torch.inf)


def framed(picture: Float[Tensor, "c height width"], step: int) -> Float[Tensor, "1 c h w"]:
    """A picture with one more pixel of `step` by `step` at each side."""
    return pad(picture[None], (step,) * 4, "replicate")


def around(picture: Float[Tensor, "c height width"], step: int) -> Float[Tensor, "pixels values"]:
    """Of each pixel of `step` by `step`, what a picture shows in 3x3 of them around it."""
    return unfold(framed(picture, step), 3 * step, stride=step)[0].T


def beside(pixels: Int[Tensor, " n"], height: int, width: int) -> Int[Tensor, "n neighbours"]:
    """Each pixel and those that are at most two away from it."""
    away = torch.arange(-2, 3)
    near = torch.cartesian_prod(away, away)
    rows, columns = near[near.square().sum(dim=1) <= 4].T
    row = (pixels[:, None] // width + rows).clamp(0, height - 1)
    return row * width + (pixels[:, None] % width + columns).clamp(0, width - 1)
