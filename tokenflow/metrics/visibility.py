"""Which pixels of one frame can be seen in another, and where they are there."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Bool, Float
from torch import Tensor

from tokenflow.propagation import ClipFlow, warp
from tokenflow.propagation.flow.base import targets

RELATIVE, ABSOLUTE = 0.01, 0.5
"""What the way there and back may miss: a share of the squared lengths, and squared pixels."""

VisibleFlow = Callable[
    [int, int], tuple[Float[Tensor, "2 height width"], Bool[Tensor, "height width"]]
]
"""Flow from one frame to another in pixels (x, y), and the pixels of the first that are visible."""


def visible(
    there: Float[Tensor, "2 height width"], back: Float[Tensor, "2 height width"]
) -> Bool[Tensor, "height width"]:
    """Pixels that the other frame shows too: the flow w there and ŵ back, taken there, cancel,

        |w + ŵ|² <= 0.01 (|w|² + |ŵ|²) + 0.5 pixels²,

    and w ends inside of the frame. Blind to what is hidden where both flows agree on a wrong place.
    Source: Sundaram, Brox and Keutzer 2010, equation 5.
    """
    returned = warp(back, there)
    missed = (there + returned).square().sum(dim=0)
    lengths = there.square().sum(dim=0) + returned.square().sum(dim=0)
    height, width = there.shape[-2:]
    x, y = targets(there)
    inside = (x >= 0) & (y >= 0) & (x <= width - 1) & (y <= height - 1)
    return inside & (missed <= RELATIVE * lengths + ABSOLUTE)


def visible_flow(flow: ClipFlow) -> VisibleFlow:
    """A clip's flow, which must be kept at full resolution, with what is `visible` by it."""

    def between(start: int, end: int) -> tuple[Tensor, Tensor]:
        there, back = (both[:2] for both in flow.between(start, end))
        return there, visible(there, back)

    return between
