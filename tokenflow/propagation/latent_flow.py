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
from tokenflow.propagation.fusion import smooth
from tokenflow.video import Clip

LOST, FAR = 1.0, 0.04
"""Flow is lost where it misses by so many latent pixels on the way there and back, or where what it
leads to differs by this mean square, of values from 0 to 1."""
ALONE = 0.5
"""A patch is found if it differs by less than this share of what differs least of those more than
two latent pixels away: not one stripe among others."""
EDGE, ONE_WAY = 0.01, 0.05
"""A latent pixel has edges of one direction if the structure tensor's larger eigenvalue, the mean
squared slope of values from 0 to 1 per latent pixel, is above the first, and the smaller one below
this share of it."""
REACH, ALIKE, RIDGE = 6, 0.2, 0.01
"""Flow along edges is solved for in a disc of so many latent pixels, by what moves alike within
about so many of them, and is their mean where the disc shows slopes in other directions by less
than about this share."""
AT_ONCE = 2**22
"""Differences in memory at once."""


class LatentFlow(ClipFlow):
    """Flow that moves latents where a kernel has none, for pairs of frames that are near.

    `DIS` measures neighbouring frames; along edges of one direction, as on stripes, where a small
    patch does not tell how it moves (the aperture problem), flow is that of all around what moves
    alike. For two further apart the flow to the frame before is
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
            there, back = (flow[:2] for flow in super().pair(start, end))
            there, back = self.along_edges(start, end, there), self.along_edges(end, start, back)
            return with_inconsistency(there, back), with_inconsistency(back, there)
        for middle in range(start + 1, end):  # each is composed of the one before, which is kept
            before = self.between(start, middle)
        there, back = (flow[:2] for flow in before)
        onward, homeward = (flow[:2] for flow in self.between(end - 1, end))
        there = self.refined(start, end, there + warp(onward, there))
        back = self.refined(end, start, homeward + warp(back, homeward))
        there, back = with_inconsistency(there, back), with_inconsistency(back, there)
        there, back = self.found_again(start, end, there), self.found_again(end, start, back)
        return with_inconsistency(there, back), with_inconsistency(back, there)

    def along_edges(
        self, start: int, end: int, flow: Float[Tensor, "2 h w"]
    ) -> Float[Tensor, "2 h w"]:
        """A flow whose part along edges of one direction is solved for in a larger disc.

        By Lucas and Kanade 1981, "An Iterative Image Registration Technique with an Application to
        Stereo Vision", with weights by how alike flow is, so that what is behind has no say.
        """
        one, other = (self.small.frame(frame) for frame in (start, end))
        (height, width), step = flow.shape[-2:], self.step
        slopes = torch.stack(torch.gradient(one, dim=(2, 1))) * step  # along x and y
        tensors = avg_pool2d((slopes[:, None] * slopes).sum(dim=2), step)
        local = smooth(tensors).flatten(2).movedim(2, 0)
        (least, most), axes = (of.movedim(-1, 0) for of in torch.linalg.eigh(local))
        pixels = ((most > EDGE) & (least < ONE_WAY * most)).nonzero()[:, 0]
        along, near = axes[0, pixels], beside(pixels, height, width, REACH)
        tensors = tensors.flatten(2).movedim(2, 0)[near]
        for _ in range(3):
            larger = interpolate(flow[None], one.shape[-2:], mode="bilinear")[0]
            # what slopes times the true flow would be
            shift = (slopes * larger[:, None]).sum(dim=0) + one - warp(other, larger * step)
            moved = flow.flatten(1).T
            wanted = avg_pool2d((slopes * shift).sum(dim=1), step).flatten(1).T
            differing = (moved[near] - moved[pixels, None]).square().sum(dim=2)
            weights = torch.softmax(-differing / (2 * ALIKE**2), dim=1)
            tensor, sums, mean = (
                torch.einsum("nk,nk...->n...", weights, of)
                for of in (tensors, wanted[near], moved[near])
            )
            # where the disc shows edges of one direction alone, too, the mean decides
            weak = RIDGE * tensor.diagonal(dim1=1, dim2=2).sum(dim=1) + 1e-6
            ridge = weak[:, None, None] * torch.eye(2)
            solved = torch.linalg.solve(tensor + ridge, sums + weak[:, None] * mean)
            change = ((solved - moved[pixels]) * along).sum(dim=1, keepdim=True) * along
            flow = moved.index_add(0, pixels, change).T.unflatten(1, (height, width))
        return flow

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


def beside(
    pixels: Int[Tensor, " n"], height: int, width: int, reach: int = 2
) -> Int[Tensor, "n neighbours"]:
    """Each pixel and those that are at most so many away from it."""
    away = torch.arange(-reach, reach + 1)
    near = torch.cartesian_prod(away, away)
    rows, columns = near[near.square().sum(dim=1) <= reach**2].T
    row = (pixels[:, None] // width + rows).clamp(0, height - 1)
    return row * width + (pixels[:, None] % width + columns).clamp(0, width - 1)
