"""Read a clip from a video file or from a folder of images."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from math import prod
from pathlib import Path
from sys import maxsize

import torch
from jaxtyping import Float
from torch import Tensor

from tokenflow.scratch import BUDGET
from tokenflow.video.clip import AudioSpan, Clip, VideoError
from tokenflow.video.frames import Frames, Reel
from tokenflow.video.image_folder import image_source
from tokenflow.video.sizing import Fit, Framing, framing
from tokenflow.video.source import MAX_PIXELS, Picture, Source
from tokenflow.video.video_file import video_source

FINEST_RATE = 10_000  # image_rate's largest denominator, and so the inverse of its least value


def read_clip(
    path: str | Path,
    *,
    start: int = 0,
    stop: int | None = None,
    stride: int = 1,
    max_frames: int | None = None,
    resolution: int | None = None,
    fit: Fit = "resize",
    multiple: int = 1,
    image_rate: Fraction | float | int = 8,
    in_memory: bool = True,
    each: Callable[[], None] = lambda: None,
) -> Clip:
    """Read the frames start, start + stride, … before stop, in the order of display.

    Each frame is scaled as it is decoded and frames that are not chosen are not kept. Where
    nothing has to be scaled, frames are the decoded values exactly.

    Args:
        path: a video file, or a folder of images (png, jpg, webp, bmp; by name, 2 before 10).
        start: first frame, from 0.
        stop: frame to end before, at most the number of frames; None reads to the end. Where
            max_frames ends earlier, the file is not read so far, and stop not compared with it.
        stride: take every stride-th frame; the clip keeps its true times, at a lower rate.
        max_frames: take at most so many frames, and read no further.
        resolution: short side in pixels; None keeps the source's.
        fit: how both sides become multiples of `multiple`: "resize" stretches the picture a
            little, and `display_size` undoes that; "crop" cuts the edges off for good.
        multiple: what both sides must be divisible by, in pixels; the nearest is taken.
        image_rate: frames per second of an image folder, from 0.0001 to 10000.
        in_memory: whether all frames are to be in memory; otherwise they are `Frames`, looked at
            once, and of a longer clip decoded again when they are asked for.
        each: called after each frame, which may take long: what it raises ends the reading.

    Raises:
        VideoError: for anything that cannot be read as asked, with the path and the frame.
    """
    path = Path(path)
    for name, value, least in (
        ("start", start, 0),
        ("stop", stop, start + 1),
        ("stride", stride, 1),
        ("max_frames", max_frames, 1),
        ("resolution", resolution, 1),
        ("multiple", multiple, 1),
    ):
        if value is not None and value < least:
            raise VideoError(f"{path}: expected {name} to be at least {least}, got {value}.")
    if fit not in ("resize", "crop"):
        raise VideoError(f'{path}: expected fit to be "resize" or "crop", got {fit!r}.')
    if not 1 / FINEST_RATE <= image_rate <= FINEST_RATE:
        raise VideoError(
            f"{path}: expected image_rate to be from {1 / FINEST_RATE} to {FINEST_RATE} frames "
            f"per second, got {image_rate}."
        )

    reading = Reading(
        path, start, stop, stride, max_frames, resolution, fit, multiple,
        Fraction(image_rate).limit_denominator(FINEST_RATE),
    )  # fmt: skip
    reel = Reel(reading.frames, maxsize if in_memory else BUDGET)
    known: list[Fraction | None] = []
    with reading.opened() as source:
        for number, picture in enumerate(reading.chosen(source)):
            known.append(picture.time)
            image = reading.whole(picture)
            if reel.has_room:
                reel.keep(number, reading.plan.apply(image / 255))
            each()

    rate = source.rate / stride
    times = _times(path, known, start, stride, source.rate)
    frames = Frames(reel.frame, range(len(times)), reading.plan.working)
    return Clip(
        frames=frames[:] if in_memory else frames,
        times=tuple(time - times[0] for time in times),
        rate=rate,
        name=clip_name(path),
        display_size=reading.plan.display,
        audio=AudioSpan(path, times[0], times[-1] + 1 / rate) if source.has_audio else None,
    )


@dataclass
class Reading:
    """Which frames are read from where, and how; as the arguments of `read_clip`.

    The first frame that is looked at says how all of them are scaled.
    """

    path: Path
    start: int
    stop: int | None
    stride: int
    max_frames: int | None
    resolution: int | None
    fit: Fit
    multiple: int
    image_rate: Fraction
    shape: torch.Size | None = None
    plan: Framing = field(init=False)

    @contextmanager
    def opened(self) -> Iterator[Source]:
        """The file or folder; it can be opened again."""
        if self.path.is_dir():
            yield image_source(self.path, self.image_rate)
        elif self.path.is_file():
            with video_source(self.path) as source:
                yield source
        else:
            raise VideoError(
                f"{self.path}: expected a video file or a folder of images, found nothing."
            )

    def chosen(self, source: Source) -> Iterator[Picture]:
        """The frames that are asked for; VideoError where there are not so many."""
        start, stop, count, taken = self.start, self.stop, 0, 0
        for index, picture in enumerate(source.pictures):
            if index >= start and (index - start) % self.stride == 0:
                yield picture
                taken += 1
            count = index + 1
            if count == stop or taken == self.max_frames:
                return
        if count == 0:
            raise VideoError(f"{self.path}: expected frames, found none; choose another file.")
        if start >= count or stop is not None:
            asked = f"start={start}" if start >= count else f"stop={stop}"
            raise VideoError(f"{self.path} has {count} frames (0 to {count - 1}), got {asked}.")

    def whole(self, picture: Picture) -> Float[Tensor, "3 height width"]:
        """A frame as it is in the file, 0..255; VideoError unless it has the first one's size."""
        image = picture.rgb()
        if self.shape is None:
            self.shape, size = image.shape, (image.shape[1], image.shape[2])
            self.plan = framing(
                size, picture.pixel_aspect, self.resolution, self.fit, self.multiple
            )
            if max(map(prod, (self.plan.scaled, self.plan.working))) > MAX_PIXELS:
                height, width = self.plan.scaled
                raise VideoError(
                    f"{self.path}: expected a resolution that makes frames of at most {MAX_PIXELS} "
                    f"pixels, got {width}x{height}; give a lower one."
                )
        if image.shape != self.shape:
            raise VideoError(
                f"{self.path}: expected frames of one size, but {picture.label} is "
                f"{_size(image.shape)} and those before it {_size(self.shape)}; "
                "choose other frames or scale them to one size first."
            )
        return image.float()

    def frames(self) -> Iterator[Callable[[], Float[Tensor, "3 height width"]]]:
        """Decodes from the beginning; each frame is scaled if it is wanted."""

        def scaled(picture: Picture) -> Float[Tensor, "3 height width"]:
            return self.plan.apply(self.whole(picture) / 255)

        with self.opened() as source:
            for picture in self.chosen(source):
                yield partial(scaled, picture)


def clip_name(path: Path) -> str:
    """A folder's name, a file's without its suffix."""
    return path.resolve().name if path.is_dir() else path.stem


def _times(
    path: Path, times: list[Fraction | None], start: int, stride: int, rate: Fraction
) -> list[Fraction]:
    known = [time for time in times if time is not None]
    if len(known) == len(times) and known == sorted(set(known)):
        return known
    warnings.warn(
        f"{path}: its frame times are missing or out of order; frames are spaced evenly, "
        f"at {float(rate):.3f} per second.",
        stacklevel=3,
    )
    return [(start + index * stride) / rate for index in range(len(times))]


def _size(shape: torch.Size) -> str:
    return f"{shape[2]}x{shape[1]}"
