"""Long-range consistency: warp error between frames that are far apart."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tokenflow.metrics.visibility import VisibleFlow
from tokenflow.metrics.warp_error import squared_changes
from tokenflow.video import Frames


class LongRangeError(NamedTuple):
    """The warp error of frames so far apart, and the share of their pixels that it is of."""

    error: float
    visible: float


def long_range(
    frames: Float[Tensor, "frames 3 height width"] | Frames, flow: VisibleFlow, distance: int
) -> LongRangeError | None:
    """Warp error of every frame and the one d frames on; none for a clip that is too short:

        mean over i, over visible p and over channels of (x_i(p) - x_{i+d}(p + flow_{i,i+d}(p)))².

    The flow leads from one to the other at once. Unit: squared intensity, 0..1; 0 is perfect. What
    drifts slowly is small at a distance of 1 and shows here. Blind to objects that turn away or
    leave, and where the flow fails over so long a distance. The visible share, 0..1, is that of the
    pixels measured; the error is NaN where it is 0.
    Source: `warp_error`'s, of frames further apart; the long-term loss of Lai et al. 2018 (arXiv
    1808.00449) is between each frame and the first.
    """
    if distance >= len(frames):
        return None
    error, pixels, seen = 0.0, 0, 0
    for start in range(len(frames) - distance):
        pair = start, start + distance
        motion, visible = flow(*pair)
        changes = squared_changes(frames[list(pair)], motion[None])[visible[None]]
        error += float(changes.double().sum())
        pixels, seen = pixels + visible.numel(), seen + int(visible.sum())
    return LongRangeError(error / seen if seen else torch.nan, seen / pixels)
