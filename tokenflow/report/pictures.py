"""Frames as the page shows them: embedded videos and pictures, slices over time, curves."""

from __future__ import annotations

import io
import math
from base64 import b64encode
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from einops import rearrange
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from tokenflow.metrics import visible, warp_error
from tokenflow.propagation import DIS
from tokenflow.video import Clip, Frames, levels, resized, write_video

SPACE = 14_000_000
"""Bytes of videos on one page; in base64 they take a third more."""
SOURCE_CRF = 23
LOSSLESS = 500_000  # pixels; larger pictures may lose a little
WIDEST = 2000  # pixels of a picture; of a slice a third
ALONG = 256  # pixels of the frames between which flow is found
ROWS, TALLEST = 24, 500  # of the slices over time, and frames in each


def data_uri(data: bytes, kind: str) -> str:
    """Bytes as the address of themselves."""
    return f"data:{kind};base64,{b64encode(data).decode()}"


def picture(image: Float[Tensor, "3 height width"]) -> str:
    """A picture in 0..1 as WebP, made smaller where it is wider than `WIDEST`."""
    height, width = image.shape[1:]
    if width > WIDEST:
        image = resized(image, (round(height * WIDEST / width), WIDEST))
    pixels = levels(image).permute(1, 2, 0).contiguous()
    file = io.BytesIO()
    lossless = pixels.shape[0] * pixels.shape[1] <= LOSSLESS
    # where nothing is lost, quality is the effort to make the file small
    quality, method = (20, 1) if lossless else (90, 2)
    image_file = Image.fromarray(pixels.numpy())
    image_file.save(file, "WEBP", lossless=lossless, quality=quality, method=method)
    return data_uri(file.getvalue(), "image/webp")


@dataclass(frozen=True)
class Embedded:
    """A video on the page, or the reason that it is not."""

    uri: str | None
    left_out: str = ""
    sound: bool = False


class Space:
    """What room a page has for videos, in bytes; who comes first is served."""

    def __init__(self, whole: int) -> None:
        self.whole = self.left = whole

    def file(self, path: Path, sound: bool = False) -> Embedded:
        """A video file as it is."""
        size = path.stat().st_size
        if size > self.left:
            return Embedded(
                None,
                f"{path.name} is left out: it has {size / 1e6:.1f} MB, and the page has room "
                f"for {self.whole / 1e6:.0f} MB of videos.",
            )
        self.left -= size
        return Embedded(data_uri(path.read_bytes(), "video/mp4"), sound=sound)

    def source(self, clip: Clip) -> Embedded:
        """A source's frames as a small video."""
        with TemporaryDirectory() as folder:
            path = Path(folder) / "source.mp4"
            write_video(path, clip.frames, clip.times, clip.rate, end=clip.end, crf=SOURCE_CRF)
            return self.file(path)


def slice_rows(height: int) -> list[int]:
    """The pixel rows that can be looked at over time, spaced evenly."""
    count = min(ROWS, height)
    return [int((i + 0.5) * height / count) for i in range(count)]


def slices(
    frames: Float[Tensor, "frames 3 height width"] | Frames, rows: list[int]
) -> Float[Tensor, "3 rows_frames narrowed"]:
    """Each row over time, x to the right and time downwards, one slice below the other.

    Of long clips every so manieth frame.
    """
    stride = math.ceil(len(frames) / TALLEST)
    shown = [frame[:, rows] for frame in islice(frames, 0, None, stride)]
    stacked = rearrange(shown, "f c r w -> c (r f) w")
    return resized(stacked, (stacked.shape[1], min(stacked.shape[2], WIDEST // 3)))


def warp_errors(
    source: Float[Tensor, "frames 3 height width"] | Frames,
    edited: Float[Tensor, "frames 3 height width"] | Frames,
) -> tuple[list[float | None], list[float | None]]:
    """Of source and edit, each frame's warp error from the one before, × 1000.

    By the source's flow (DIS), where both frames show a pixel, at a size of `ALONG` at most.
    """
    flow = DIS()
    errors: tuple[list[float | None], list[float | None]] = [None], [None]
    both = zip(map(small, source), map(small, edited), strict=True)
    for before, after in pairwise(both):
        pairs = [torch.stack(pair) for pair in zip(before, after, strict=True)]
        clip = Clip.from_frames(pairs[0])
        there, back = flow.between(clip, 0, 1), flow.between(clip, 1, 0)
        seen = visible(there, back)
        for known, pair in zip(errors, pairs, strict=True):
            error = 1000 * warp_error(pair, there[None], seen[None]) if seen.any() else None
            known.append(error)
    return errors


def small(frame: Float[Tensor, "3 height width"]) -> Float[Tensor, "3 smaller narrower"]:
    """A frame of at most `ALONG` pixels at its longer side, and no less than DIS needs."""
    height, width = frame.shape[1:]
    scale = max(min(1.0, ALONG / max(height, width)), 12 / min(height, width))
    return resized(frame, (round(scale * height), round(scale * width)))


def distance(
    a: Float[Tensor, "frames 3 height width"] | Frames,
    b: Float[Tensor, "frames 3 height width"] | Frames,
) -> list[float | None]:
    """Mean absolute difference of each frame from its counterpart, in levels of 255."""
    return [255 * float((x - y).abs().mean()) for x, y in zip(a, b, strict=True)]


@dataclass(frozen=True)
class Curve:
    """A number for each frame; None where there is none."""

    name: str
    kind: str
    values: list[float | None]

    def points(self, top: float) -> str:
        """Its SVG polyline in a box of 1000 × 100, `top` being the upper edge."""
        last = max(len(self.values) - 1, 1)
        return " ".join(
            f"{1000 * i / last:.1f},{100 - 100 * value / top:.2f}"
            for i, value in enumerate(self.values)
            if value is not None
        )


@dataclass(frozen=True)
class Plot:
    """Curves over the same frames, from 0 to a round number at the top."""

    title: str
    about: str
    unit: str
    curves: list[Curve]

    @property
    def top(self) -> float:
        """The least of 1, 2, 5, 10, … tenths that no value exceeds."""
        largest = max((v for c in self.curves for v in c.values if v is not None), default=0.0)
        exponent = math.floor(math.log10(max(largest, 0.1)))
        return next(m * 10.0**exponent for m in (1, 2, 5, 10) if largest <= m * 10.0**exponent)
