"""Read a clip from a video file or from a folder of images."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from tokenflow.video.clip import AudioSpan, Clip, VideoError
from tokenflow.video.image_folder import image_source
from tokenflow.video.sizing import Fit, Framing, framing
from tokenflow.video.source import Picture, Source
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
    part: Callable[[int], range] | None = None,
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
        part: told how many frames that makes, says which consecutive ones of them to keep: the
            clip then is that part of the whole. The video is decoded twice for it.

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

    images = Fraction(image_rate).limit_denominator(FINEST_RATE)
    choice = start, stop, stride, max_frames
    kept, whole = None, None
    if part is not None:
        with _open(path, images) as source:
            whole = sum(1 for _ in _chosen(path, source, *choice))
        kept = part(whole)

    with _open(path, images) as source:
        frames: list[Float[Tensor, "3 height width"]] = []
        times: list[Fraction | None] = []
        first: tuple[torch.Size, Framing] | None = None
        for index, picture in enumerate(_chosen(path, source, *choice)):
            times.append(picture.time)
            if kept is not None and index not in kept:
                continue
            image = picture.rgb()
            if first is None:
                size = (image.shape[1], image.shape[2])
                plan = framing(size, picture.pixel_aspect, resolution, fit, multiple)
                first = (image.shape, plan)
            shape, plan = first
            if image.shape != shape:
                raise VideoError(
                    f"{path}: expected frames of one size, but {picture.label} is "
                    f"{_size(image.shape)} and those before it {_size(shape)}; "
                    "choose other frames or scale them to one size first."
                )
            frames.append(plan.apply(image.float() / 255))

    seconds = _times(path, times, start, stride, source.rate)
    rate = source.rate / stride
    return Clip(
        frames=torch.stack(frames),
        times=tuple(seconds[i] - seconds[0] for i in kept or range(len(seconds))),
        rate=rate,
        name=clip_name(path),
        display_size=plan.display,
        audio=AudioSpan(path, seconds[0], seconds[-1] + 1 / rate) if source.has_audio else None,
        first=kept.start if kept else 0,
        whole=whole,
    )


def clip_name(path: Path) -> str:
    """A folder's name, a file's without its suffix."""
    return path.resolve().name if path.is_dir() else path.stem


@contextmanager
def _open(path: Path, image_rate: Fraction) -> Iterator[Source]:
    if path.is_dir():
        yield image_source(path, image_rate)
    elif path.is_file():
        with video_source(path) as source:
            yield source
    else:
        raise VideoError(f"{path}: expected a video file or a folder of images, found nothing.")


def _chosen(
    path: Path, source: Source, start: int, stop: int | None, stride: int, limit: int | None
) -> Iterator[Picture]:
    count = taken = 0
    for index, picture in enumerate(source.pictures):
        if index >= start and (index - start) % stride == 0:
            yield picture
            taken += 1
        count = index + 1
        if count == stop or taken == limit:
            return
    if count == 0:
        raise VideoError(f"{path}: expected frames, found none; choose another file.")
    if start >= count or stop is not None:
        asked = f"start={start}" if start >= count else f"stop={stop}"
        raise VideoError(f"{path} has {count} frames (0 to {count - 1}), got {asked}.")


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
