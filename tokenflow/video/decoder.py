"""Pictures that decode clean, of streams that begin or pause as real ones do."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator

import av
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream


class DamagedError(Exception):
    """A picture that cannot be decoded as it was encoded."""


# Others tell of damage by a frame's mark or an error. With this option they would refuse sound
# streams as well: those that were cut out of others, or have supplementary data that is broken.
ONLY_STRICT_TELLS = ("mjpeg", "mjpegb")
STRICT = {"err_detect": "explode"}


def configure(stream: VideoStream, max_pixels: int) -> None:
    """Set a stream's decoder up for `clean_frames`."""
    context = stream.codec_context
    strict = STRICT if context.name in ONLY_STRICT_TELLS else {}
    context.options = {"max_pixels": str(max_pixels), **strict}


def clean_frames(
    packets: Iterable[Packet], skipped: Callable[[int], None] = lambda count: None
) -> Iterator[VideoFrame]:
    """A video stream's frames in the order of display.

    What was cut out of another stream begins with packets that only the pictures before would
    explain: they are passed over, up to a key frame, and `skipped` is called with their number.
    An empty packet is none: the picture before is shown on.

    Raises:
        DamagedError: A later packet or frame is marked as damaged.
        av.FFmpegError: A later packet cannot be decoded, or the file cannot be read.
    """
    started = False
    early: list[int] = []  # times of the packets before the first picture
    failed: list[int | None] = []  # times of those that gave no clean one
    reason: Exception | None = None
    for packet, *following in _with_next(_flushed(packets), 2):
        if not started and packet.pts is not None and not packet.is_discard:
            early.append(packet.pts)
        try:
            # marked as well where streams were joined, just before the key frame of the next part
            if packet.is_corrupt and not any(later.is_keyframe for later in following):
                raise DamagedError("its packet is marked corrupt")
            frames = packet.decode()
        except (av.FFmpegError, DamagedError) as error:
            if started:
                raise
            failed.append(packet.pts)
            reason = error
            continue
        for frame in frames:
            assert isinstance(frame, VideoFrame)
            if frame.is_corrupt:
                reason = DamagedError("it is marked corrupt")
                if started or frame.key_frame:
                    raise reason
                failed.append(frame.pts)
            elif started or not failed or frame.key_frame:
                if not started:
                    started = True
                    if reason is not None and any(_after(pts, frame.pts) for pts in failed):
                        raise reason  # it was only decoded before this picture
                    if count := sum(_after(frame.pts, pts) for pts in early) + failed.count(None):
                        skipped(count)
                yield frame
    if not started and reason is not None:
        raise reason


def _flushed(packets: Iterable[Packet]) -> Iterator[Packet]:
    """Those that hold anything, and last the one that makes the decoder give the rest."""
    flush = None
    for packet in packets:
        if packet.size:
            yield packet
        else:
            flush = packet  # decoded earlier, it would end the decoder
    if flush is not None:
        yield flush


def _with_next(packets: Iterable[Packet], count: int) -> Iterator[tuple[Packet, ...]]:
    """Each, with those that follow, `count` of them but at the end."""
    ahead: deque[Packet] = deque()
    for packet in packets:
        ahead.append(packet)
        if len(ahead) > count:
            yield tuple(ahead)
            ahead.popleft()
    while ahead:
        yield tuple(ahead)
        ahead.popleft()


def _after(a: int | None, b: int | None) -> bool:
    return a is not None and b is not None and a > b
