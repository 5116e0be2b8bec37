"""Long-range consistency: warp error between frames that are far apart."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tokenflow.metrics.motion import Motions
from tokenflow.metrics.warp_error import squared_changes
from tokenflow.video import Frames


class Consistency(NamedTuple):
    """The warp error of frames so far apart, and the share of their pixels that it is of."""

    error: float
    visible: float


def long_range(
    frames: Float[Tensor, "frames 3 height width"] | Frames, motions: Motions, distance: int
) -> Consistency | None:
    """Warp error of every frame i and frame i + distance; none for a clip that is too short.

    The flow leads from one to the other at once. Unit and range as those of `warp_error`; what
    drifts slowly is small at distance 1 and shows here. Blind to objects that turn away or leave,
    and to whatever the flow does not find over so long a way: the visible share, 0..1, says how
    much was looked at, and the error is NaN where that is 0.
    """
    if distance >= len(frames):
        return None
    error, pixels, seen = 0.0, 0, 0
    for start in range(len(frames) - distance):
        pair = start, start + distance
        flow, visible = motions.between(*pair)
        changes = squared_changes(frames[list(pair)], flow[None])[visible[None]]
        error += float(changes.double().sum())
        pixels, seen = pixels + visible.numel(), seen + int(visible.sum())
    return Consistency(error / seen if seen else torch.nan, seen / pixels)
