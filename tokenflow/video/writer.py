"""Write clips and pictures, whole or not at all."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from heapq import merge
from io import BytesIO
from itertools import chain
from math import lcm
from pathlib import Path

import av
import torch
from av.container import OutputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from av.video.stream import VideoStream
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from tokenflow.storage.atomic import atomic
from tokenflow.video.audio import audio_track, increasing, way_of
from tokenflow.video.clip import AudioSpan, Clip, VideoError, check_rate, check_times
from tokenflow.video.colour import EXACT
from tokenflow.video.frames import Frames, levels
from tokenflow.video.sizing import Size, nearest, resized

FINEST = 1_000_000  # ticks per second, for times that share no coarser unit


def write_video(
    path: str | Path,
    frames: Float[Tensor, "frames 3 height width"]
    | Frames
    | Iterable[Float[Tensor, "3 height width"]],
    times: Sequence[Fraction],
    rate: Fraction,
    *,
    end: Fraction | None = None,
    size: Size | None = None,
    audio: AudioSpan | None = None,
    crf: int = 16,
) -> Path:
    """Write an mp4 that any player shows: H.264, yuv420p, BT.709 in limited range, with sound.

    Args:
        path: where to, ending in .mp4; it is replaced only once the whole video is written.
        frames: RGB, 0..1 (clamped), on any device; an iterable is taken one frame at a time.
        times: when each frame is shown, in seconds, increasing; kept as they are.
        rate: nominal frames per second, at most 1000.
        end: when the last frame goes, in seconds as `times`; 1/rate after it came if not given.
        size: (height, width) to scale to; None is the first frame's. H.264 in yuv420p needs
            even sides, so odd ones become the next even number, by scaling.
        audio: the sound to copy without re-encoding; what mp4 cannot carry becomes AAC.
        crf: x264's quality, 0 (lossless but for the colour conversion) to 51.

    Raises:
        VideoError: for no frames, frames of a wrong shape, or times that do not fit them.
    """
    path = Path(path)
    if path.suffix.lower() != ".mp4":
        raise VideoError(f"{path}: expected a name that ends in .mp4.")
    check_rate(rate, str(path))
    if not 0 <= crf <= 51:
        raise VideoError(f"{path}: expected crf in 0..51, got {crf}.")
    count = len(frames) if isinstance(frames, Tensor | Frames) else len(times)
    check_times(times, count, str(path), end)
    images = _checked(path, frames, len(times))
    first = next(images)
    height, width = size or first.shape[1:]
    end = times[-1] + 1 / rate if end is None else end

    with (
        atomic(path) as temporary,
        _as_video_error(path),
        av.open(f"file:{temporary}", "w", options={"movflags": "faststart"}) as output,
    ):
        stream = _stream(output, (height, width), rate, _tick([*times, end]), crf)
        with audio_track(audio, output) as sound:
            picture = _encoded(stream, zip(chain([first], images), times, strict=True), end)
            for packet in merge(picture, increasing(sound, output), key=_decoding_time):
                output.mux(packet)
    return path


@contextmanager
def _as_video_error(what: str | Path) -> Iterator[None]:
    try:
        yield
    except av.FFmpegError as error:
        if isinstance(error, OSError):  # the disk's
            raise
        raise VideoError(f"{what} cannot be written ({error.strerror}).") from error


def _stream(
    output: OutputContainer, size: Size, rate: Fraction, tick: Fraction, crf: int
) -> VideoStream:
    stream = output.add_stream(
        "libx264",
        rate=rate.limit_denominator(100_000),
        height=nearest(size[0], 2),
        width=nearest(size[1], 2),
        time_base=tick,
        # Without B-frames packets are in the order of display, and so every frame of a
        # variable rate, the last included, lasts as long as it should.
        options={"crf": str(crf), "bf": "0"},
    )
    context = stream.codec_context
    context.colorspace = Colorspace.ITU709
    context.color_range = ColorRange.MPEG
    context.color_primaries = ColorPrimaries.BT709
    context.color_trc = ColorTrc.BT709
    return stream


def require_writable(clip: Clip, size: Size | None = None) -> Clip:
    """The clip, without its sound where that cannot be written, which a warning says.

    To be called before a clip is edited for nothing.

    Args:
        clip: As `write_clip` is to write it.
        size: (height, width) of the largest video; the clip's display size if not given.

    Raises:
        VideoError: Its frames cannot be written in this size.
    """
    height, width = size or clip.display_size
    with (
        _as_video_error(f"a video of {width}x{height}"),
        av.open(BytesIO(), "w", format="mp4") as output,
    ):
        tick = _tick([*clip.times, clip.end or Fraction(0)])
        stream = _stream(output, (height, width), clip.rate, tick, 51)
        for packet in _encoded(stream, [(torch.zeros(3, 1, 1), Fraction(0))], Fraction(1)):
            output.mux(packet)
    sound = clip.audio if clip.audio is not None and way_of(clip.audio) else None
    return dataclasses.replace(clip, audio=sound)


def write_image(path: str | Path, image: Float[Tensor, "3 height width"]) -> Path:
    """Write a PNG of an RGB picture in 0..1 (clamped)."""
    path = Path(path)
    with atomic(path) as temporary:
        Image.fromarray(_pixels(image).numpy()).save(temporary, format="PNG")
    return path


def _checked(
    path: Path, frames: Iterable[Float[Tensor, "3 height width"]], count: int
) -> Iterator[Float[Tensor, "3 height width"]]:
    index = -1
    for index, frame in enumerate(frames):
        if frame.ndim != 3 or len(frame) != 3:
            raise VideoError(
                f"{path}: expected frames of shape (3, height, width), "
                f"got {tuple(frame.shape)} for frame {index}."
            )
        if index == count:
            break
        yield frame
    if index == -1:
        raise VideoError(f"{path}: expected frames, got none; nothing is written.")
    if index != count - 1:
        came = "more" if index == count else index + 1
        raise VideoError(f"{path}: expected {count} frames, one for each time, got {came}.")


def _tick(times: Sequence[Fraction]) -> Fraction:
    """The longest unit that all times are multiples of, or a microsecond if that is longer."""
    return Fraction(1, min(lcm(*(time.denominator for time in times)), FINEST))


def _encoded(
    stream: VideoStream,
    shown: Iterable[tuple[Float[Tensor, "3 height width"], Fraction]],
    end: Fraction,
) -> Iterator[Packet]:
    size, tick, last = (stream.height, stream.width), stream.codec_context.time_base, -1
    for image, time in shown:
        pixels = _pixels(resized(image.float(), size)).numpy()
        frame = VideoFrame.from_ndarray(pixels, format="rgb24").reformat(
            format="yuv420p",
            dst_colorspace=Colorspace.ITU709,
            dst_color_range=ColorRange.MPEG,
            interpolation=EXACT,
            threads=1,
        )
        frame.time_base = tick
        frame.pts = last = max(round(time / tick), last + 1)
        yield from stream.encode(frame)
    for packet in stream.encode(None):
        if packet.pts == last:  # else the muxer repeats the duration before
            packet.duration = max(1, round(end / tick) - last)
        yield packet


def _decoding_time(packet: Packet) -> Fraction:
    assert packet.dts is not None  # of an encoder's and of `audio_track`'s packets
    return packet.dts * packet.time_base


def _pixels(image: Float[Tensor, "3 height width"]) -> UInt8[Tensor, "height width 3"]:
    return levels(image).permute(1, 2, 0).contiguous().cpu()


def write_clip(path: str | Path, clip: Clip, *, crf: int = 16) -> Path:
    """Write a clip as `write_video` does, at its display size, with its times and its sound."""
    return write_video(
        path, clip.frames, clip.times, clip.rate, end=clip.end,
        size=clip.display_size, audio=clip.audio, crf=crf,
    )  # fmt: skip
