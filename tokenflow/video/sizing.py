"""Sizes of frames. A size is (height, width) in pixels, as in tensors."""

from dataclasses import dataclass
from fractions import Fraction
from math import floor
from typing import Literal

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate

Size = tuple[int, int]
Fit = Literal["resize", "crop"]


def nearest(value: Fraction | int, multiple: int) -> int:
    """The multiple of `multiple` that is nearest to `value`, at least one; halves go up."""
    return max(1, floor(Fraction(value) / multiple + Fraction(1, 2))) * multiple


def resized(image: Float[Tensor, "3 height width"], size: Size) -> Float[Tensor, "3 h w"]:
    """The image at another size, antialiased bicubic, in 0..1; itself if it has that size."""
    if tuple(image.shape[1:]) == size:
        return image
    return interpolate(image[None], size, mode="bicubic", antialias=True)[0].clamp(0, 1)


@dataclass(frozen=True)
class Framing:
    """How a source's frames become a clip's: scaled to `scaled`, then cut to `working`."""

    scaled: Size
    working: Size
    display: Size

    def apply(self, image: Float[Tensor, "3 height width"]) -> Float[Tensor, "3 h w"]:
        height, width = self.working
        top, left = (self.scaled[0] - height) // 2, (self.scaled[1] - width) // 2
        cut = resized(image, self.scaled)[:, top : top + height, left : left + width]
        return cut.contiguous()  # a view would keep the whole frame in memory


def framing(
    size: Size, pixel_aspect: Fraction, resolution: int | None, fit: Fit, multiple: int
) -> Framing:
    """Plan the sizes for upright frames of `size`, whose pixels are `pixel_aspect` times as wide
    as high.

    The picture in square pixels is brought to a short side of `resolution` (None: its own), then
    both sides to the nearest multiple of `multiple`: by stretching ("resize"; the display size
    keeps the true aspect, in even numbers), or by covering and cutting the middle out ("crop").
    """
    # Square pixels by stretching one side, so that no detail is lost.
    height = size[0] / min(pixel_aspect, Fraction(1))
    width = size[1] * max(pixel_aspect, Fraction(1))
    scale = Fraction(1) if resolution is None else resolution / min(height, width)
    working = (nearest(height * scale, multiple), nearest(width * scale, multiple))
    if fit == "resize":
        return Framing(working, working, (nearest(height * scale, 2), nearest(width * scale, 2)))
    cover = max(working[0] / height, working[1] / width)
    return Framing((nearest(height * cover, 1), nearest(width * cover, 1)), working, working)
