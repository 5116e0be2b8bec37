"""Optical flow: how far, and which way, each point of one frame has moved in another."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import avg_pool2d, grid_sample

from tokenflow.errors import InputError
from tokenflow.video import Clip


class OpticalFlow(ABC):
    """Finds the motion between two frames of a clip.

    There is one convention: a flow of shape (2, height, width) holds x, then y, in pixels, and
    what frame `start` shows at p, frame `end` shows at p + flow(p). Subclasses are chosen by
    their name; their constructor's typed arguments are their options.
    """

    measures_frames: ClassVar[bool] = True
    """Whether it measures the motion of the frames that it is given, so of an edit's, too. Files
    and scenes hold the source's motion only."""

    def prepare(self, clip: Clip) -> None:  # noqa: B027 (need not be overridden)
        """Called once for every clip, before any work.

        Raises:
            InputError: The clip has no flow by it; the message says what to do.
        """

    def cache_key(self) -> str:
        """A digest of the files that it depends on besides options and clip; none by default."""
        return ""

    @abstractmethod
    def between(self, clip: Clip, start: int, end: int) -> Float[Tensor, "2 height width"]:
        """The flow from the clip's frame(`start`) to its frame(`end`), in float32.

        A pure function of the clip and the two positions, asked for once per clip.
        """


def warp(
    values: Float[Tensor, "channels height width"],
    flow: Float[Tensor, "2 height width"],
    mode: Literal["bilinear", "bicubic"] = "bilinear",
) -> Float[Tensor, "channels height width"]:
    """`values` sampled at p + flow(p); outside, the border's repeat."""
    height, width = flow.shape[-2:]
    there = targets(flow)
    size = torch.tensor([max(width - 1, 1), max(height - 1, 1)]).to(flow)
    grid = 2 * there.movedim(0, -1)[None] / size - 1
    return grid_sample(values[None], grid, mode, padding_mode="border", align_corners=True)[0]


def inside(flow: Float[Tensor, "*flows 2 height width"]) -> Float[Tensor, "*flows height width"]:
    """1 where p + flow(p) lies in the frame, else 0."""
    height, width = flow.shape[-2:]
    limit = torch.tensor([width, height]).to(flow)[:, None, None] - 0.5
    there = targets(flow)
    return ((there >= -0.5) & (there <= limit)).all(dim=-3).to(flow)


def targets(
    flow: Float[Tensor, "*flows 2 height width"],
) -> Float[Tensor, "*flows 2 height width"]:
    """Where flow takes each pixel: p + flow(p), (x, y)."""
    height, width = flow.shape[-2:]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack((x, y)).to(flow) + flow


def beside(
    pixels: Int[Tensor, " n"], height: int, width: int, reach: int
) -> Int[Tensor, "n neighbours"]:
    """Each pixel, counted row by row, and those at most `reach` away; at a border some repeat."""
    away = torch.arange(-reach, reach + 1)
    near = torch.cartesian_prod(away, away)
    rows, columns = near[near.square().sum(dim=1) <= reach**2].T
    row = (pixels[:, None] // width + rows).clamp(0, height - 1)
    return row * width + (pixels[:, None] % width + columns).clamp(0, width - 1)


def smooth(values: Float[Tensor, "*n h w"]) -> Float[Tensor, "*n h w"]:
    """Means over 3×3 pixels."""
    return avg_pool2d(values, 3, stride=1, padding=1, count_include_pad=False)


def require_flow(flow: object, clip: Clip, what: str) -> None:
    """Raises `InputError` unless `flow` is a tensor of the clip's size with no NaN or infinity."""
    height, width = clip.frames.shape[-2:]
    if not (isinstance(flow, Tensor) and flow.is_floating_point()):
        found = flow.dtype if isinstance(flow, Tensor) else type(flow).__name__
        raise InputError(f"{what} is no flow: expected a tensor of floats, got {found}")
    if flow.shape != (2, height, width):
        raise InputError(
            f"{what} is a flow of shape {tuple(flow.shape)}, expected (2, {height}, {width}): x "
            f"and y for every pixel of the clip's frames, which predict has at the size at which "
            f"they are edited, and evaluate at that of the run's videos"
        )
    if bad := int((~flow.isfinite()).any(dim=0).sum()):
        raise InputError(
            f"{what} has NaN or infinite values in {bad} of {height * width} pixels, expected "
            f"pixels of motion everywhere; fill them in, for example with their neighbours'"
        )
