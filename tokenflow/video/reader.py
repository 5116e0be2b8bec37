"""Read a clip from a video file or from a folder of images."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from hashlib import blake2b
from math import prod
from pathlib import Path
from sys import maxsize

import torch
from jaxtyping import Float
from torch import Tensor

from tokenflow.storage.scratch import BUDGET
from tokenflow.video.clip import MAX_RATE, AudioSpan, Clip, VideoError, file_state
from tokenflow.video.clock import repaired
from tokenflow.video.frames import DecodeCache, Frames
from tokenflow.video.image_folder import SUFFIXES, image_source
from tokenflow.video.sizing import Fit, Framing, framing
from tokenflow.video.source import MAX_PIXELS, Picture, VideoSource
from tokenflow.video.video_file import video_source

SLOWEST = Fraction(1, 10_000)  # image_rate


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
    deep: bool = False,
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
        image_rate: frames per second of an image folder, from 0.0001 to 1000.
        in_memory: whether all frames are to be in memory; otherwise they are `Frames`, looked at
            once, and of a longer clip decoded again when they are asked for.
        deep: whether images and videos of more than 8 bits keep all their levels, as depth needs;
            grey images of 16 bits are taken only then.

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
        if value is not None and value > maxsize:
            raise VideoError(f"{path}: expected {name} to be at most {maxsize}, got {value}.")
    if fit not in ("resize", "crop"):
        raise VideoError(f'{path}: expected fit to be "resize" or "crop", got {fit!r}.')
    if not SLOWEST <= image_rate <= MAX_RATE:
        raise VideoError(
            f"{path}: expected image_rate to be from {float(SLOWEST)} to {MAX_RATE} frames "
            f"per second, got {image_rate}."
        )

    reading = Reading(
        path, start, stop, stride, max_frames, resolution, fit, multiple,
        Fraction(image_rate).limit_denominator(SLOWEST.denominator), deep,
    )  # fmt: skip
    cache = DecodeCache(reading.frames, maxsize if in_memory else BUDGET)
    known: list[Fraction | None] = []
    state = file_state(path)
    with reading.opened() as source:
        pictures = iter(source.pictures)
        for number, picture in enumerate(reading.chosen(pictures)):
            known.append(picture.time)
            image = reading.whole(number, picture)
            if cache.has_room:
                cache.keep(number, reading.plan.apply(image / 255))
        period = stride / source.rate
        times = _times(path, known, period, start / source.rate)
        end = _end(source, reading, pictures, times[-1], period)

    frames = Frames(cache.frame, range(len(times)), reading.plan.working)
    return Clip(
        frames=frames[:] if in_memory else frames,
        times=tuple(time - times[0] for time in times),
        rate=source.rate / stride,
        name=clip_name(path),
        display_size=reading.plan.display,
        audio=AudioSpan(path, times[0], end, state) if source.has_audio else None,
        end=end - times[0],
    )


@dataclass
class Reading:
    """Which frames are read from where, and how; as the arguments of `read_clip`.

    The first frame that is looked at says how all of them are scaled. `last` is the source's latest
    picture so far, chosen or not; `digests` are of what each chosen frame was when it was first
    read.
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
    deep: bool = False
    shape: torch.Size | None = None
    plan: Framing = field(init=False)
    last: Picture | None = None
    digests: dict[int, bytes] = field(default_factory=dict)

    @contextmanager
    def opened(self) -> Iterator[VideoSource]:
        """The file or folder; it can be opened again."""
        image = self.path.is_file() and self.path.suffix.lower() in SUFFIXES
        if self.path.is_dir() or image:
            yield image_source(self.path, self.image_rate, self.deep)
        elif self.path.is_file():
            with video_source(self.path, self.deep) as source:
                yield source
        else:
            raise VideoError(
                f"{self.path}: expected a video file or a folder of images, found nothing."
            )

    def chosen(self, pictures: Iterable[Picture]) -> Iterator[Picture]:
        """The frames that are asked for; VideoError where there are not so many."""
        start, stop, count, taken = self.start, self.stop, 0, 0
        for index, picture in enumerate(pictures):
            self.last = picture
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

    def whole(self, number: int, picture: Picture) -> Float[Tensor, "3 height width"]:
        """A frame as it is in the file, 0..255.

        VideoError unless it has the first one's size, and is what it was when it was first read.
        """
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
        digest = blake2b(image.contiguous().numpy().data, digest_size=16).digest()
        if self.digests.setdefault(number, digest) != digest:
            raise self.changed(f"{picture.label} is another")
        return image.float()

    def changed(self, reason: str) -> VideoError:
        """What there is to say when the source is no longer what it was."""
        return VideoError(
            f"{self.path} has changed since it was read first ({reason}); start again, and leave "
            f"it as it is until the edit is done."
        )

    def frames(self) -> Iterator[Callable[[], Float[Tensor, "3 height width"]]]:
        """Decodes from the beginning; each frame is scaled if it is wanted."""

        def scaled(number: int, picture: Picture) -> Float[Tensor, "3 height width"]:
            return self.plan.apply(self.whole(number, picture) / 255)

        number = -1
        try:
            with self.opened() as source:
                for number, picture in enumerate(self.chosen(source.pictures)):
                    yield partial(scaled, number, picture)
        except VideoError as error:  # what was there before
            raise self.changed(str(error)) from error
        if number + 1 < len(self.digests):
            raise self.changed(f"it has {number + 1} of {len(self.digests)} frames")


def clip_name(path: Path) -> str:
    """A folder's name, a file's without its suffix."""
    return path.resolve().name if path.is_dir() else path.stem


def _times(
    path: Path, known: list[Fraction | None], period: Fraction, first: Fraction
) -> list[Fraction]:
    times, new = repaired(known, period, first)
    if new:
        warnings.warn(
            f"{path}: the times of {new} of {len(times)} frames are missing or out of order; they "
            f"are spaced evenly between the others.",
            stacklevel=3,
        )
    return times


def _end(
    source: VideoSource,
    reading: Reading,
    pictures: Iterator[Picture],
    time: Fraction,
    period: Fraction,
) -> Fraction:
    """When the last chosen frame, of this time, goes: with the next one, or at the source's end."""
    try:
        after = next(pictures, None)
    except VideoError:  # it is not asked for
        return time + period
    if after is not None:
        near = reading.stride == 1 and after.time is not None and after.time > time
        return after.time if near and after.time is not None else time + period
    ends = (source.end, reading.last.end if reading.last else None)
    return next((end for end in ends if end is not None and end > time), time + period)


def _size(shape: torch.Size) -> str:
    return f"{shape[2]}x{shape[1]}"
