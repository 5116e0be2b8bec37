"""What the reader asks of a place that frames come from."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from jaxtyping import Float, UInt8
from torch import Tensor

MAX_PIXELS = 64 * 1024 * 1024


class Picture(NamedTuple):
    """One frame on offer; whoever wants its pixels has them converted.

    label: what an error calls it.
    time: seconds, if the source tells.
    duration: seconds that it is shown for, if the source tells; a hint, as the next one's time is
        what counts.
    pixel_aspect: a pixel's width over its height, in the upright picture.
    rgb: the upright picture, in 8-bit levels or fractions of them.
    """

    label: str
    time: Fraction | None
    duration: Fraction | None
    pixel_aspect: Fraction
    rgb: Callable[[], UInt8[Tensor, "3 height width"] | Float[Tensor, "3 height width"]]

    @property
    def end(self) -> Fraction | None:
        """When it goes, if the source tells."""
        return None if self.time is None or self.duration is None else self.time + self.duration


@dataclass(frozen=True)
class VideoSource:
    """Pictures in the order of display; their nominal number per second; if there is sound.

    end: when the last picture goes, if the container tells better than that picture.
    """

    rate: Fraction
    pictures: Iterator[Picture]
    end: Fraction | None = None
    has_audio: bool = False
