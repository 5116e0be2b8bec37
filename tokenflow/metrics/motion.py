"""Where the pixels of one frame are in another, and which of them can be seen there."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from tokenflow.propagation import OpticalFlow
from tokenflow.propagation.optical_flow import require_flow, targets, warp
from tokenflow.storage.scratch import BUDGET
from tokenflow.video import Clip

RELATIVE, ABSOLUTE = 0.01, 0.5
"""What the way there and back may miss: a share of the squared lengths, and squared pixels."""


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


class Motions:
    """The flow between frames of one clip by a provider.

    Pairs are kept as long as there is room, 1 GiB at 9 bytes a pixel; others are found anew.

    Args:
        clip: Whose motion it is.
        flow: What finds it.

    Raises:
        InputError: There can be no flow of this clip.
    """

    def __init__(self, clip: Clip, flow: OpticalFlow) -> None:
        flow.prepare(clip)
        self.clip, self.flow = clip, flow
        self.found: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def between(
        self, start: int, end: int
    ) -> tuple[Float[Tensor, "2 height width"], Bool[Tensor, "height width"]]:
        """Flow from one frame to another in pixels (x, y), and the first one's visible pixels."""
        if (start, end) not in self.found:
            there, back = self.checked(start, end), self.checked(end, start)
            pair = there, visible(there, back)
            if (len(self.found) + 1) * sum(part.nbytes for part in pair) > BUDGET:
                return pair
            self.found[start, end] = pair
        return self.found[start, end]

    def checked(self, start: int, end: int) -> Float[Tensor, "2 height width"]:
        """The provider's flow, as a flow must be."""
        flow = self.flow.between(self.clip, start, end)
        require_flow(flow, self.clip, f"{type(self.flow).__name__} from frame {start} to {end}")
        return flow
