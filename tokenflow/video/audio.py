"""Carry a clip's sound over into the video made from it."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import lru_cache
from tempfile import TemporaryFile
from typing import cast

import av
from av.audio.frame import AudioFrame
from av.audio.layout import AudioLayout
from av.audio.stream import AudioStream
from av.container import InputContainer, OutputContainer
from av.packet import Packet

from tokenflow.video.clip import AudioSpan, VideoError, file_state
from tokenflow.video.clock import repaired
from tokenflow.video.video_file import audio_stream, open_container, timed_packets

# What an mp4 can carry and players can play; anything else becomes AAC.
COPIED = {"aac", "ac3", "alac", "eac3", "flac", "mp3", "opus"}
# Decoders settle over a few packets (Opus asks for 80 ms). Packets this long before the start
# get negative times, which the mp4's edit list keeps from being heard.
LEAD_IN = Fraction(80, 1000)
PERIOD = Fraction(1, 50)  # of packets that do not tell how long they are
BEYOND = 100  # packets in a row after the span: no single time that is wrong
RATE = 48_000
LAYOUTS = ("mono", "stereo", "3.0", "quad", "5.0", "5.1", "6.1", "7.1")  # by number of channels
ALSO_NATIVE = ("2.1", "3.1", "4.0", "4.1", "5.0(side)", "5.1(side)", "6.0", "7.0")

Way = Callable[[AudioSpan, InputContainer, AudioStream, OutputContainer], Iterator[Packet]]


class UnsuitedError(Exception):
    """Sound that cannot be carried over in the way that was tried."""


@contextmanager
def audio_track(span: AudioSpan | None, output: OutputContainer) -> Iterator[Iterator[Packet]]:
    """Add the span's sound to `output`, and give its packets in order of decoding.

    Their times count from the span's start, and increase. Sound that cannot be carried over is
    left out, from there on, with a warning: it does not cost the user the picture. So each way is
    tried before, with a temporary file.
    """
    way = None if span is None else way_of(span)
    if span is None or way is None:
        yield iter(())
        return
    with open_container(span.path) as source:
        yield _forgiving(span, way(span, source, _stream(source), output))


def way_of(span: AudioSpan) -> Way | None:
    """How the sound can be carried over; None, after a warning, if it cannot."""
    try:
        if span.state not in (None, file_state(span.path)):
            raise UnsuitedError("it has changed since its picture was read")
        return _rehearsed(span)
    except UnsuitedError as error:
        _warn(span, str(error))
        return None


@lru_cache(maxsize=16)  # asked before an edit, and when it is written
def _rehearsed(span: AudioSpan) -> Way:
    reason = ""
    for way in (_copied, _encoded):
        try:
            _rehearse(span, way)
            return way
        except (VideoError, UnsuitedError, ValueError) as error:
            reason = str(error)
        except av.FFmpegError as error:
            reason = str(error.strerror)
    raise UnsuitedError(reason)


def _rehearse(span: AudioSpan, way: Way) -> None:
    with (
        open_container(span.path) as source,
        TemporaryFile() as file,
        av.open(file, "w", format="mp4") as output,
        warnings.catch_warnings(),  # they come when it is done
    ):
        warnings.simplefilter("ignore")
        for packet in increasing(way(span, source, _stream(source), output), output):
            output.mux(packet)


def increasing(packets: Iterator[Packet], output: OutputContainer) -> Iterator[Packet]:
    """Packets of one stream whose times increase strictly in the output's own unit, as muxers
    want it.
    """
    last: int | None = None
    for packet in packets:
        output.start_encoding()  # which says what the unit is, and does nothing a second time
        unit, base = packet.stream.time_base, packet.time_base
        assert packet.dts is not None  # of `_copied`, and of an encoder
        assert packet.pts is not None
        assert unit is not None
        dts = round(packet.dts * base / unit)
        late = 0 if last is None else max(0, last + 1 - dts)
        packet.pts = round(packet.pts * base / unit) + late
        packet.dts = last = dts + late
        packet.duration = round((packet.duration or 0) * base / unit)
        packet.time_base = unit
        yield packet


def _stream(source: InputContainer) -> AudioStream:
    stream = audio_stream(source)
    if stream is None:
        raise UnsuitedError("it has none that can be read")
    return stream


def _forgiving(span: AudioSpan, packets: Iterator[Packet]) -> Iterator[Packet]:
    try:
        yield from packets
    except (av.FFmpegError, UnsuitedError) as error:
        _warn(span, str(getattr(error, "strerror", error)))


def _warn(span: AudioSpan, reason: str) -> None:
    warnings.warn(f"the sound of {span.path} is left out or cut short: {reason}", stacklevel=2)


def _packets(
    span: AudioSpan, source: InputContainer, stream: AudioStream
) -> Iterator[tuple[Packet, Fraction]]:
    """The span's packets, with what comes shortly before, each with its time from the start."""
    with open_container(span.path) as same:
        known = _times(span, same, _stream(same))
    times, _ = repaired(known, PERIOD)
    for packet, time in zip(_filled(source, stream), times, strict=False):
        if span.start - LEAD_IN <= time < span.stop:
            yield packet, time - span.start


def _times(span: AudioSpan, source: InputContainer, stream: AudioStream) -> list[Fraction | None]:
    times: list[Fraction | None] = []
    beyond = 0
    for packet in _filled(source, stream):
        time = packet.pts if packet.pts is not None else packet.dts
        times.append(None if time is None else time * packet.time_base)
        beyond = beyond + 1 if times[-1] is not None and times[-1] >= span.stop else 0
        if beyond > BEYOND:
            break
    return times


def _filled(source: InputContainer, stream: AudioStream) -> Iterator[Packet]:
    return (packet for packet in timed_packets(source, stream) if packet.size)


def _copied(
    span: AudioSpan, source: InputContainer, stream: AudioStream, output: OutputContainer
) -> Iterator[Packet]:
    codec = stream.codec_context.codec.canonical_name
    if codec not in COPIED:
        raise UnsuitedError("an mp4 does not carry it as it is")
    target = output.add_stream_from_template(stream)
    configuration = None
    for packet, time in _packets(span, source, stream):
        here = _adts(packet) if codec == "aac" else None
        if configuration not in (None, here):
            raise UnsuitedError("its channels or rate change, which an mp4 does not tell")
        configuration = here
        packet.pts = packet.dts = round(time / packet.time_base)
        packet.stream = target
        yield packet


def _adts(packet: Packet) -> tuple[int, int] | None:
    """Rate and channels in the header that AAC has in MPEG streams (ISO/IEC 13818-7, 6.2)."""
    head = bytes(packet)[:4] if packet.size >= 4 else b"\0\0\0\0"
    if head[0] != 0xFF or head[1] & 0xF6 != 0xF0:
        return None
    return head[2] & 0x3D, head[3] & 0xC0


def _encoded(
    span: AudioSpan, source: InputContainer, stream: AudioStream, output: OutputContainer
) -> Iterator[Packet]:
    layout = "mono" if _made_native(stream) == 1 else "stereo"
    target = output.add_stream("aac", rate=RATE, layout=layout)
    length, graph, kind, undecodable = span.stop - span.start, None, None, 0
    last = None
    for packet, time in _packets(span, source, stream):
        packet.pts = packet.dts = round(time / packet.time_base)
        try:
            frames = packet.decode()
        except av.FFmpegError:
            undecodable += 1
            continue
        for frame in frames:
            assert isinstance(frame, AudioFrame)
            now = (frame.format.name, frame.sample_rate, frame.layout.name)
            if graph is None or now != kind:
                if graph is not None:
                    yield from _drained(graph, target)
                graph, kind = _graph(*now, target, length), now
            at = frame.pts * frame.time_base if frame.pts is not None else last
            if at is None:
                continue
            frame.time_base = Fraction(1, frame.sample_rate)
            frame.pts = round(at * frame.sample_rate)
            last = at + Fraction(frame.samples, frame.sample_rate)
            graph.push(frame)
            yield from _pulled(graph, target)
    if graph is None:
        raise UnsuitedError("none of it can be decoded")
    yield from _drained(graph, target)
    yield from target.encode(None)
    if undecodable:
        _warn(span, f"{undecodable} of its packets cannot be decoded")


def _made_native(stream: AudioStream) -> int:
    """The number of channels, after the stream's layout has been made one that can be named.

    To be called once, before anything else asks for the layout: PyAV frees what tells of a custom
    one when it is let go, and once more later, which ends the process.
    """
    layout = stream.codec_context.layout
    channels, name = layout.nb_channels, layout.name
    del layout
    if name not in (*LAYOUTS, *ALSO_NATIVE):
        few = channels <= len(LAYOUTS)
        name = LAYOUTS[channels - 1] if few else f"0x{(1 << channels) - 1:x}"
    stream.codec_context.layout = AudioLayout(name)
    return channels


def _graph(
    format: str, rate: int, layout: str, target: AudioStream, length: Fraction
) -> av.filter.Graph:
    graph = av.filter.Graph()
    graph.link_nodes(
        graph.add_abuffer(sample_rate=rate, format=format, layout=layout),
        # fills gaps and trims overlaps beyond 20 ms, so that picture and sound stay together
        graph.add("aresample", f"{target.rate}:async=1:min_hard_comp=0.02"),
        graph.add(
            "aformat",
            f"sample_fmts={target.format.name}:sample_rates={target.rate}"
            f":channel_layouts={target.layout.name}",
        ),
        graph.add("atrim", f"start=0:end={float(length)}"),
        graph.add("abuffersink"),
    ).configure()
    return graph


def _drained(graph: av.filter.Graph, target: AudioStream) -> Iterator[Packet]:
    graph.push(None)
    yield from _pulled(graph, target)


def _pulled(graph: av.filter.Graph, target: AudioStream) -> Iterator[Packet]:
    while True:
        try:
            frame = cast(AudioFrame, graph.pull())
        except (av.BlockingIOError, av.EOFError):
            return
        yield from target.encode(frame)
