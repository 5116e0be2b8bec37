"""Carry a clip's sound over into the video made from it."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import cast

import av
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.container import InputContainer, OutputContainer
from av.packet import Packet

from tokenflow.video.clip import AudioSpan, VideoError
from tokenflow.video.video_file import audio_stream, open_container

# What an mp4 can carry and players can play; anything else becomes AAC.
COPIED = {"aac", "ac3", "alac", "eac3", "flac", "mp3", "opus"}
# Decoders settle over a few packets (Opus asks for 80 ms). Packets this long before the start
# get negative times, which the mp4's edit list keeps from being heard.
LEAD_IN = Fraction(80, 1000)


@contextmanager
def audio_track(span: AudioSpan | None, output: OutputContainer) -> Iterator[Iterator[Packet]]:
    """Add the span's sound to `output`, and give its packets in order of decoding.

    Their times count from the span's start. Sound that cannot be read is left out, from there
    on, with a warning: it does not cost the user the picture.
    """
    if span is None:
        yield iter(())
        return
    try:
        container = open_container(span.path)
    except VideoError as error:
        _warn(span, str(error))
        yield iter(())
        return
    with container as source:
        yield _forgiving(span, _packets(span, source, output))


def _packets(span: AudioSpan, source: InputContainer, output: OutputContainer) -> Iterator[Packet]:
    stream = audio_stream(source)
    if stream is None:
        _warn(span, "it has none that can be read")
        return iter(())
    if stream.codec_context.codec.canonical_name in COPIED:
        return _copied(span, source, stream, output.add_stream_from_template(stream))
    layout = "mono" if stream.channels == 1 else "stereo"
    return _encoded(span, source, stream, output.add_stream("aac", rate=48_000, layout=layout))


def _forgiving(span: AudioSpan, packets: Iterator[Packet]) -> Iterator[Packet]:
    try:
        yield from packets
    except av.FFmpegError as error:
        _warn(span, str(error.strerror))


def _warn(span: AudioSpan, reason: str) -> None:
    warnings.warn(f"the sound of {span.path} is left out or cut short: {reason}", stacklevel=2)


def _copied(
    span: AudioSpan, source: InputContainer, stream: AudioStream, target: AudioStream
) -> Iterator[Packet]:
    for packet in source.demux(stream):
        if packet.pts is None or packet.dts is None:
            continue
        time = packet.pts * packet.time_base
        if time >= span.stop:
            break
        if time >= span.start - LEAD_IN:
            shift = round(span.start / packet.time_base)
            packet.pts -= shift
            packet.dts -= shift
            packet.stream = target
            yield packet


def _encoded(
    span: AudioSpan, source: InputContainer, stream: AudioStream, target: AudioStream
) -> Iterator[Packet]:
    graph = av.filter.Graph()
    graph.link_nodes(
        graph.add_abuffer(template=stream),
        graph.add("atrim", f"start={float(span.start)}:end={float(span.stop)}"),
        graph.add("asetpts", f"PTS-{float(span.start)}/TB"),
        graph.add(
            "aformat",
            f"sample_fmts={target.format.name}:sample_rates={target.rate}"
            f":channel_layouts={target.layout.name}",
        ),
        graph.add("abuffersink"),
    ).configure()
    for frame in source.decode(stream):
        if frame.time is not None and frame.time >= span.stop:
            break
        graph.push(frame)
        yield from _drain(graph, target)
    graph.push(None)
    yield from _drain(graph, target)
    yield from target.encode(None)


def _drain(graph: av.filter.Graph, target: AudioStream) -> Iterator[Packet]:
    while True:
        try:
            frame = cast(AudioFrame, graph.pull())
        except (av.BlockingIOError, av.EOFError):
            return
        yield from target.encode(frame)
