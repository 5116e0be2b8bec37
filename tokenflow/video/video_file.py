"""A video file as a source of pictures, by PyAV."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from heapq import heappop, heappush
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition, Stream
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from jaxtyping import Float, UInt8
from torch import Tensor

from tokenflow.video import colour
from tokenflow.video.clip import MAX_RATE, VideoError
from tokenflow.video.clock import continuous, restarts
from tokenflow.video.decoder import DamagedError, clean_frames, configure
from tokenflow.video.source import MAX_PIXELS, Picture, VideoSource

Pixels = UInt8[Tensor, "3 height width"] | Float[Tensor, "3 height width"]
# By name, since a playlist (m3u8, concat, dash) can pull in any other file or address.
CONTAINERS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf,gif,yuv4mpegpipe"


def open_container(path: Path) -> InputContainer:
    """Open one local media file, and nothing it may refer to; VideoError if it is none."""
    try:
        # "file:" keeps FFmpeg from seeing a protocol in a name with a colon.
        return av.open(
            f"file:{path}",
            container_options={"format_whitelist": CONTAINERS, "protocol_whitelist": "file"},
        )
    except av.FFmpegError as error:
        raise VideoError(
            f"{path} is not a video that can be read ({error.strerror}); expected a whole file "
            f"in one of the formats {CONTAINERS} (playlists are refused), or a folder of images."
        ) from error


def audio_stream(container: InputContainer) -> AudioStream | None:
    """The sound that goes with the picture: the default, or the first, that can be decoded."""
    streams = [s for s in container.streams.audio if s.codec_context is not None]
    return next((s for s in streams if s.disposition & Disposition.default), None) or next(
        iter(streams), None
    )


def picture_stream(container: InputContainer) -> VideoStream | None:
    """The first video stream that is no cover picture."""
    streams = [s for s in container.streams if isinstance(s, VideoStream)]
    return next((s for s in streams if not s.disposition & Disposition.attached_pic), None)


def timed_packets(container: InputContainer, *wanted: Stream) -> Iterator[Packet]:
    """The packets of the wanted streams, pictures and sound on one clock."""
    both = (picture_stream(container), audio_stream(container))
    # on a clock that may begin anew, all streams say when it does
    streams = [s for s in both if s is not None] if restarts(container) else wanted
    indices = [stream.index for stream in wanted]
    return (p for p in continuous(container, *streams) if p.stream.index in indices)


@contextmanager
def video_source(path: Path, deep: bool = False) -> Iterator[VideoSource]:
    """The pictures of a file's first video stream, upright, with their true times, in BT.709.

    If `deep`, those of more than 8 bits have all their levels, and their colours are as they are.

    VideoError says what is wrong with the file, and at which frame. What cannot be decoded before
    the first picture is skipped with a warning.
    """
    with open_container(path) as container:
        stream = _require_picture(path, container)
        configure(stream, MAX_PIXELS)
        yield VideoSource(
            rate=_rate(path, stream),
            pictures=_pictures(path, container, stream, deep),
            end=_end(container, stream),
            has_audio=audio_stream(container) is not None,
        )


def count_frames(path: Path) -> int:
    """How many pictures a video file has, by its packets: none is decoded.

    Raises:
        VideoError: It is no video file that can be read.
    """
    with open_container(path) as container:
        stream = _require_picture(path, container)
        try:
            return sum(bool(p.size) and not p.is_discard for p in container.demux(stream))
        except av.FFmpegError as error:
            raise VideoError(f"{path} cannot be read to its end ({error.strerror})") from error


def _require_picture(path: Path, container: InputContainer) -> VideoStream:
    stream = picture_stream(container)
    if stream is None:
        kinds = ", ".join(sorted({s.type for s in container.streams} - {"video"})) or "none"
        raise VideoError(f"{path}: expected a video stream, found {kinds}; choose another file.")
    if stream.codec_context is None:
        raise VideoError(f"{path}: no decoder for its video; re-encode it, for example as H.264.")
    if stream.width * stream.height > MAX_PIXELS:
        raise VideoError(
            f"{path}: expected frames of at most {MAX_PIXELS} pixels, got "
            f"{stream.width}x{stream.height}; scale the video down first."
        )
    return stream


def _rate(path: Path, stream: VideoStream) -> Fraction:
    rates = [rate for rate in (stream.average_rate, stream.guessed_rate) if rate]
    if rates and min(rates) > MAX_RATE:
        raise VideoError(
            f"{path}: expected at most {MAX_RATE} frames per second, got {float(rates[0]):.0f}; "
            f"correct its rate, for example by ffmpeg -r 30 -i {path.name} …"
        )
    return next((rate for rate in rates if rate <= MAX_RATE), Fraction(25))


def _end(container: InputContainer, stream: VideoStream) -> Fraction | None:
    """When the last picture goes, as QuickTime's edit list says; else the picture itself knows.

    Where the sound goes on for longer than a picture, the last one stays, as players have it.
    """
    base = stream.time_base
    if "mov" not in container.format.name.split(",") or stream.duration is None or base is None:
        return None
    end = ((stream.start_time or 0) + stream.duration) * base
    whole = Fraction((container.start_time or 0) + (container.duration or 0), av.time_base)
    return whole if whole > end + 1 / (stream.average_rate or Fraction(25)) else end


def _pictures(
    path: Path, container: InputContainer, stream: VideoStream, deep: bool
) -> Iterator[Picture]:
    aspect = stream.sample_aspect_ratio or Fraction(1)
    index, end = 0, None
    # Asked once, as a frame whose side data was looked at stays until Python looks for cycles.
    axes: dict[int, tuple[int, int, int, int]] = {}
    said: set[str] = set()
    context = stream.codec_context
    decoded: list[int] = []  # a heap: with B-frames, the earliest is the next picture's

    def warn(what: str) -> None:
        if what not in said:
            said.add(what)
            warnings.warn(f"{path}: {what}", stacklevel=5)

    def skipped(count: int) -> None:
        for _ in range(min(count, len(decoded))):
            heappop(decoded)
        warn(f"{count} packets before its first picture cannot be decoded; they are skipped.")

    try:
        packets = timed_packets(container, stream)
        if container.format.name == "avi":  # which has times in the order of decoding only
            packets = _noted(packets, decoded)
        for frame in clean_frames(packets, skipped):
            if decoded and context.has_b_frames:
                frame.pts = heappop(decoded)
            more = deep and max(component.bits for component in frame.format.components) > 8
            if not more and (high := colour.dynamic_range(frame)):
                warn(f"its high dynamic range ({high}) is converted; the edit is SDR, in BT.709.")
            if frame.interlaced_frame:
                warn(
                    "it is interlaced, so moving edges are combed; deinterlace it first, for "
                    f"example by ffmpeg -i {path.name} -vf bwdif …"
                )
            if frame.rotation not in axes:
                axes[frame.rotation] = _display_axes(frame)
            decode = colour.deep if more else colour.rgb
            picture = _picture(path, index, frame, aspect, axes[frame.rotation], decode)
            yield picture
            index += 1
            end = picture.end or picture.time or end
    except DamagedError as error:
        raise _damaged(path, index, str(error)) from error
    except av.FFmpegError as error:
        raise _damaged(path, index, str(error.strerror)) from error
    # Some formats just end where they are cut off.
    announced = None if restarts(container) else _announced_end(container, stream)
    if end is not None and announced is not None and end < 0.9 * announced:
        warn(
            f"the picture ends at {float(end):.2f} s, but the file announces {announced:.2f} s; "
            "it may have been cut short."
        )


def _noted(packets: Iterator[Packet], times: list[int]) -> Iterator[Packet]:
    """The same; the decoding times of those that hold anything go to a heap."""
    for packet in packets:
        if packet.size and packet.dts is not None:
            heappush(times, packet.dts)
        yield packet


def _announced_end(container: InputContainer, stream: VideoStream) -> float | None:
    """When the picture ends, as the file says; None if it does not.

    In Matroska a tag says so, and what is called the stream's duration is that of the longest.
    """
    try:
        hours, minutes, seconds = stream.metadata["DURATION"].split(":")
        return 3600 * int(hours) + 60 * int(minutes) + float(seconds)
    except (KeyError, ValueError):
        start = (stream.start_time or 0) * (stream.time_base or 0)
        if stream.duration is not None and stream.time_base is not None:
            return float(start + stream.duration * stream.time_base)
        return None if container.duration is None else container.duration / av.time_base


def _damaged(path: Path, index: int, reason: str) -> VideoError:
    advice = f"take the frames before it (stop={index}) or " if index else ""
    return VideoError(
        f"{path}: frame {index} cannot be decoded ({reason}); the file is damaged or cut short "
        f"there. To go on, {advice}repair the file by re-encoding it."
    )


Decode = Callable[[VideoFrame, str], Pixels]


def _picture(
    path: Path,
    index: int,
    frame: VideoFrame,
    aspect: Fraction,
    axes: tuple[int, int, int, int],
    decode: Decode,
) -> Picture:
    time = duration = None
    if frame.pts is not None and frame.time_base is not None:
        time = frame.pts * frame.time_base
        duration = frame.duration * frame.time_base or None
    right_x, right_y, down_x, down_y = axes
    transpose = abs(right_y) > abs(right_x)
    down, right = (right_y, down_x) if transpose else (down_y, right_x)
    label = f"frame {index}"
    rgb = partial(_upright, f"{path}, {label}", frame, transpose, down < 0, right < 0, decode)
    return Picture(label, time, duration, 1 / aspect if transpose else aspect, rgb)


def _display_axes(frame: VideoFrame) -> tuple[int, int, int, int]:
    """Where the stored picture's right and down point to on the screen: x and y of each.

    Unlike `frame.rotation`, this also tells of mirrored pictures.
    """
    matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return 1, 0, 0, 1
    a, b, _, c, d, *_ = np.frombuffer(matrix, np.int32).tolist()
    return a, b, c, d


def _upright(
    what: str,
    frame: VideoFrame,
    transpose: bool,
    flip_rows: bool,
    flip_columns: bool,
    decode: Decode,
) -> Pixels:
    image = decode(frame, what)
    if transpose:
        image = image.transpose(1, 2)
    return image.flip([axis for axis, flip in ((1, flip_rows), (2, flip_columns)) if flip])
