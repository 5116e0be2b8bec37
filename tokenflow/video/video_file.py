"""A video file as a source of pictures, by PyAV."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import Colorspace, Interpolation
from av.video.stream import VideoStream
from jaxtyping import UInt8
from torch import Tensor

from tokenflow.video.clip import VideoError
from tokenflow.video.source import MAX_PIXELS, Picture, Source

# By name, since a playlist (m3u8, concat, dash) can pull in any other file or address.
CONTAINERS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf,gif,yuv4mpegpipe"
# swscale's shortcuts cost a level or two.
EXACT = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
# A damaged frame is an error, rather than something made up in its place.
DECODER_OPTIONS = {"err_detect": "explode", "max_pixels": str(MAX_PIXELS)}
UNTAGGED = 2  # AVCOL_SPC_UNSPECIFIED


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
    """The sound that goes with the picture: the first that can be decoded."""
    return next((s for s in container.streams.audio if s.codec_context is not None), None)


@contextmanager
def video_source(path: Path) -> Iterator[Source]:
    """The pictures of a file's first video stream, upright, with their true times.

    Colours follow each frame's own tags. Untagged frames are taken for BT.709 if they are wider
    than 1279 or higher than 576, else for BT.601, in limited range, as players do. High dynamic
    range is not tone-mapped. VideoError says what is wrong with the file, and at which frame.
    """
    with open_container(path) as container:
        stream = _video_stream(path, container)
        stream.codec_context.options = DECODER_OPTIONS
        yield Source(
            rate=stream.average_rate or stream.guessed_rate or Fraction(25),
            pictures=_pictures(path, container, stream),
            has_audio=audio_stream(container) is not None,
        )


def _video_stream(path: Path, container: InputContainer) -> VideoStream:
    # A cover image counts as a video stream, too.
    streams = [s for s in container.streams if not s.disposition & Disposition.attached_pic]
    stream = next((s for s in streams if isinstance(s, VideoStream)), None)
    if stream is None:
        kinds = ", ".join(sorted({s.type for s in streams})) or "none"
        raise VideoError(f"{path}: expected a video stream, found {kinds}; choose another file.")
    if stream.codec_context is None:
        raise VideoError(f"{path}: no decoder for its video; re-encode it, for example as H.264.")
    if stream.width * stream.height > MAX_PIXELS:
        raise VideoError(
            f"{path}: expected frames of at most {MAX_PIXELS} pixels, got "
            f"{stream.width}x{stream.height}; scale the video down first."
        )
    return stream


def _pictures(path: Path, container: InputContainer, stream: VideoStream) -> Iterator[Picture]:
    aspect = stream.sample_aspect_ratio or Fraction(1)
    index = 0
    start = end = None
    # Asked once, as a frame whose side data was looked at stays until Python looks for cycles.
    axes: dict[int, tuple[int, int, int, int]] = {}
    try:
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise _damaged(path, index, "its packet is marked corrupt")
            for frame in packet.decode():
                if frame.is_corrupt:
                    raise _damaged(path, index, "it is marked corrupt")
                if frame.rotation not in axes:
                    axes[frame.rotation] = _display_axes(frame)
                picture = _picture(index, frame, aspect, axes[frame.rotation])
                yield picture
                index += 1
                if picture.time is not None and frame.time_base is not None:
                    start = picture.time if start is None else start
                    end = picture.time + frame.duration * frame.time_base
    except av.FFmpegError as error:
        raise _damaged(path, index, str(error.strerror)) from error
    # Some formats just end where they are cut off.
    announced = _announced(container, stream)
    if start is not None and end is not None and end - start < 0.9 * announced:
        warnings.warn(
            f"{path}: the picture lasts {float(end - start):.2f} s, but the file announces "
            f"{announced:.2f} s; it may have been cut short.",
            stacklevel=4,
        )


def _announced(container: InputContainer, stream: VideoStream) -> float:
    """Seconds that the file says its picture lasts, 0 if it does not.

    In Matroska a tag says so, and what is called the stream's duration is that of the longest.
    """
    try:
        hours, minutes, seconds = stream.metadata["DURATION"].split(":")
        return 3600 * int(hours) + 60 * int(minutes) + float(seconds)
    except (KeyError, ValueError):
        if stream.duration is not None and stream.time_base is not None:
            return float(stream.duration * stream.time_base)
        return (container.duration or 0) / av.time_base


def _damaged(path: Path, index: int, reason: str) -> VideoError:
    advice = f"take the frames before it (stop={index}) or " if index else ""
    return VideoError(
        f"{path}: frame {index} cannot be decoded ({reason}); the file is damaged or cut short "
        f"there. To go on, {advice}repair the file by re-encoding it."
    )


def _picture(
    index: int, frame: VideoFrame, aspect: Fraction, axes: tuple[int, int, int, int]
) -> Picture:
    time = None
    if frame.pts is not None and frame.time_base is not None:
        time = frame.pts * frame.time_base
    right_x, right_y, down_x, down_y = axes
    transpose = abs(right_y) > abs(right_x)
    down, right = (right_y, down_x) if transpose else (down_y, right_x)
    rgb = partial(_upright, frame, transpose, down < 0, right < 0)
    return Picture(f"frame {index}", time, 1 / aspect if transpose else aspect, rgb)


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
    frame: VideoFrame, transpose: bool, flip_rows: bool, flip_columns: bool
) -> UInt8[Tensor, "3 height width"]:
    pixels = frame.to_ndarray(
        format="rgb24", src_colorspace=_colorspace(frame), interpolation=EXACT, threads=1
    )
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    if transpose:
        image = image.transpose(1, 2)
    return image.flip([axis for axis, flip in ((1, flip_rows), (2, flip_columns)) if flip])


def _colorspace(frame: VideoFrame) -> Colorspace | None:
    if frame.colorspace != UNTAGGED or frame.format.is_rgb:
        return None
    return Colorspace.ITU709 if frame.width >= 1280 or frame.height > 576 else Colorspace.ITU601
