"""DIS: optical flow by OpenCV, without weights."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, UInt8
from numpy import ndarray
from torch import Tensor

from tokenflow.errors import InputError
from tokenflow.propagation.flow.base import OpticalFlow
from tokenflow.video import Clip, luma

Preset = Literal["ultrafast", "fast", "medium"]
SMALL = 64
"""Pixels of the shorter side below which OpenCV may crash unless its search ends at all of them."""


class DIS(OpticalFlow):
    """Dense inverse search on grey images, OpenCV's: fast, and without weights.

    Source: Kroeger et al. 2016 (arXiv 1603.03590).

    Args:
        preset: Trades accuracy for speed: "ultrafast", "fast" or "medium".
        full: Whether the search ends at full resolution, rather than at a half or a quarter of it.
    """

    def __init__(self, preset: Preset = "medium", full: bool = False) -> None:
        if preset not in get_args(Preset):
            raise InputError(f"preset must be one of {get_args(Preset)}, got {preset!r}")
        self.preset, self.full = preset, full

    def prepare(self, clip: Clip) -> None:
        height, width = clip.frames.shape[-2:]
        if min(height, width) < 12:
            raise InputError(
                f"DIS needs frames of 12x12 pixels or more, got {height}x{width}; raise the "
                f"resolution or use another optical flow"
            )

    def between(self, clip: Clip, start: int, end: int) -> Float[Tensor, "2 height width"]:
        import cv2  # late: `tokenflow --help` need not wait for it

        search: Any = cv2.DISOpticalFlow.create(
            getattr(cv2, f"DISOPTICAL_FLOW_PRESET_{self.preset.upper()}")
        )
        if self.full or min(clip.frames.shape[-2:]) < SMALL:
            search.setFinestScale(0)
        found = search.calc(grey(clip.frame(start)), grey(clip.frame(end)), None)
        return torch.from_numpy(found).movedim(-1, 0)


def grey(frame: Float[Tensor, "3 height width"]) -> UInt8[ndarray, "height width"]:
    """The luma of a frame, 0 to 255."""
    return (255 * luma(frame)).round().to(torch.uint8).numpy()
