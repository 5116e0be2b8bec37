"""Files of the kinds that users have, one line each: how it is made, and what is right."""

import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.packet import Packet
from av.stream import Disposition
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from PIL import Image

from tokenflow.video import (
    Clip,
    VideoError,
    colour,
    read_clip,
    reader,
    transparent,
    write_clip,
    write_video,
)
from tokenflow.video.decoder import clean_frames

from .making import SAMPLE_RATE, beeps, heard, make_video, noise

H264 = {"codec": "libx264", "pixels": "yuv420p"}
NO_B = {"options": {"bf": "0", "g": "12", "sc_threshold": "0", "qp": "10"}}
SYNC = 0.025  # seconds that sound may be off


def plain(path: Path, seconds: float = 3, **options) -> Path:
    """Ten frames and a beep a second: at 0.5, 1.5, 2.5 s."""
    sound = beeps([n + 0.5 for n in range(int(seconds))], seconds)
    return make_video(path, noise(int(10 * seconds)), **{"sound": sound, **H264, **NO_B, **options})


def remuxed(
    source: Path, path: Path, change: Callable[[str, int, Packet], list[Packet]], **options
) -> Path:
    """A copy; `change` is given the kind of stream, the packet's number in it, and the packet."""
    with av.open(str(source)) as old, av.open(str(path), "w", **options) as new:
        streams = {s.index: new.add_stream_from_template(s) for s in old.streams}
        numbers = dict.fromkeys(streams, 0)
        for packet in old.demux():
            if packet.size:
                number, index = numbers[packet.stream_index], packet.stream_index
                numbers[index] += 1
                for kept in change(old.streams[index].type, number, packet):
                    kept.stream = streams[index]
                    new.mux_one(kept)
    return path


def starting_at(seconds: float) -> Callable[[str, int, Packet], list[Packet]]:
    def change(kind: str, number: int, packet: Packet) -> list[Packet]:
        ticks = round(Fraction(seconds) / packet.time_base)
        packet.pts, packet.dts = packet.pts + ticks, packet.dts + ticks
        return [packet]

    return change


def mistimed(path: Path, kind: str, number: int, milliseconds: int) -> Path:
    """Moves one packet's time in a Matroska file, which no muxer would write so."""
    with av.open(str(path)) as container:
        stream = next(s for s in container.streams if s.type == kind)
        packet = [p for p in container.demux(stream) if p.size][number]
        wanted, after = bytes(packet), packet.pos
    data = bytearray(path.read_bytes())
    place = data.index(wanted, after) - 3  # before the flags: 16 bits from the cluster's time on
    time = int.from_bytes(data[place : place + 2], "big", signed=True) + milliseconds
    data[place : place + 2] = time.to_bytes(2, "big", signed=True)
    path.write_bytes(data)
    return path


def only(what: str, numbers: Sequence[int]) -> Callable[[str, int, Packet], list[Packet]]:
    return lambda kind, number, packet: [packet] if kind != what or number in numbers else []


def joined(path: Path, *parts: Path) -> Path:
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    return path


def stream_file(
    path: Path,
    *,
    frames: int = 20,
    rate: int = 10,
    ticks: Sequence[int] | None = None,
    codec: str = "libx264",
    sound: tuple[str, int, str] | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    """Frames at ticks of 1/rate, and a beep in the middle of each second, in any codec, rate and
    layout.
    """
    with av.open(str(path), "w") as output:
        video = output.add_stream(codec, rate=rate, options=options or {"bf": "0"})
        video.width, video.height = 64, 48
        packets = []
        for tick, pixels in zip(ticks or range(frames), noise(frames), strict=True):
            frame = av.VideoFrame.from_ndarray(pixels).reformat(format="yuv420p")
            frame.pts, frame.time_base = tick, Fraction(1, rate)
            packets += video.encode(frame)
        packets += video.encode(None)
        if sound:
            name, hertz, layout = sound
            stream = output.add_stream(name, rate=hertz, layout=layout)
            seconds = frames // rate
            wave = beeps([n + 0.5 for n in range(seconds)], seconds)
            place = np.arange(seconds * hertz) * (SAMPLE_RATE / hertz)
            wave = np.interp(place, np.arange(len(wave)), wave).astype(np.int16)
            channels = av.AudioLayout(layout).nb_channels
            for start in range(0, len(wave), 1152):
                block = np.repeat(wave[start : start + 1152], channels)[None]
                frame = av.AudioFrame.from_ndarray(block, format="s16", layout=layout)
                frame.rate, frame.pts, frame.time_base = hertz, start, Fraction(1, hertz)
                packets += stream.encode(frame)
            packets += stream.encode(None)
        for packet in sorted(packets, key=lambda p: p.dts * p.time_base):
            output.mux(packet)
    return path


def repeated_sound(tmp: Path) -> Path:
    return mistimed(plain(tmp / "a.mkv"), "audio", 20, -21)


def joined_program_streams(tmp: Path) -> Path:
    parts = [
        stream_file(
            tmp / f"{n}.mpg",
            frames=50,
            rate=25,
            codec="mpeg2video",
            sound=("mp2", 48_000, "mono"),
            options={"bf": "0", "g": "1"},
        )
        for n in "ab"
    ]
    return joined(tmp / "c.mpg", *parts)


def changing_sound(tmp: Path, *sounds: tuple[str, int, str]) -> Path:
    """Transport streams, joined."""
    parts = [stream_file(tmp / f"{n}.ts", sound=sound) for n, sound in enumerate(sounds)]
    return joined(tmp / "c.ts", *parts)


def open_groups(path: Path) -> Path:
    return make_video(
        path, noise(48), **H264,
        options={"x264-params": "open-gop=1:keyint=12:bframes=2:scenecut=0:qp=10"},
    )  # fmt: skip


def cut_open(tmp: Path, suffix: str) -> Path:
    """From the second key frame on, whose leading pictures need the group before."""
    source = open_groups(tmp / "a.mp4")
    with av.open(str(source)) as container:
        keys = [n for n, p in enumerate(container.demux(video=0)) if p.size and p.is_keyframe]
    return remuxed(source, tmp / f"b.{suffix}", only("video", range(keys[1], 48)))


def begun_midway(tmp: Path) -> Path:
    return remuxed(plain(tmp / "a.mkv"), tmp / "b.mkv", only("video", range(7, 30)))


def broken_sei(tmp: Path) -> Path:
    """A buffering period of a parameter set that is not there, before every picture."""
    sei = bytes([0, 0, 0, 6, 0x06, 0x00, 0x02, 0x00, 0x08, 0x80])

    def damage(index: int, data: bytes) -> bytes:
        return sei + data if data[2] or data[3] else data

    return plain(tmp / "a.mkv", damage=damage)


def repeated_pictures(tmp: Path) -> Path:
    """AVI says by an empty packet that the picture stays."""
    return stream_file(
        tmp / "a.avi", frames=6, ticks=(0, 1, 2, 3, 6, 7), codec="mpeg4", options={"qmin": "2"}
    )


def not_coded(tmp: Path) -> Path:
    """MPEG-4's packets that say that the picture stays (ISO/IEC 14496-2, vop_coded 0)."""

    def change(kind: str, number: int, packet: Packet) -> list[Packet]:
        if kind == "audio" or number not in range(8, 12):
            return [packet]
        empty = Packet(bytes([0, 0, 1, 0xB6, 0x51, 0xBF]))
        empty.pts, empty.dts, empty.time_base = packet.pts, packet.dts, packet.time_base
        return [empty]

    source = stream_file(
        tmp / "a.avi", codec="mpeg4", sound=("libmp3lame", 48_000, "mono"), options={"g": "300"}
    )
    return remuxed(source, tmp / "b.avi", change)


def bad_time(tmp: Path, start: float = 0) -> Path:
    path = remuxed(plain(tmp / "a.mkv"), tmp / "b.mkv", starting_at(start))
    return mistimed(path, "video", 12, -700)


def still(path: Path, ends: float, **options) -> Path:
    """Three slides at 0, 1 and 2 s; the last stays until `ends`."""

    def change(kind: str, number: int, packet: Packet) -> list[Packet]:
        if kind == "video" and number == 2:
            packet.duration = round(Fraction(ends - 2) / packet.time_base)
        return [packet]

    times = [Fraction(n) for n in range(3)]
    source = make_video(
        path.with_name("source.mkv"), noise(3), times=times, sound=beeps([0.5, 4.5], 5), **H264,
        **NO_B, **options,
    )  # fmt: skip
    return remuxed(source, path, change)


def animation(tmp: Path) -> Path:
    images = [Image.fromarray(pixels) for pixels in noise(3)]
    images[0].save(
        tmp / "a.gif", save_all=True, append_images=images[1:], duration=[100, 200, 2500]
    )
    return tmp / "a.gif"


def two_sounds(tmp: Path) -> Path:
    """The second is the default one: it beeps at 1.2 s, the first at 0.5, 1.5 and 2.5 s."""
    a = plain(tmp / "a.mkv")
    b = plain(tmp / "b.mkv", sound=beeps([1.2], 3))
    path = tmp / "c.mkv"
    with av.open(str(a)) as first, av.open(str(b)) as second, av.open(str(path), "w") as new:
        video, sound = (new.add_stream_from_template(s) for s in first.streams)
        other = new.add_stream_from_template(second.streams.audio[0])
        sound.disposition, other.disposition = Disposition(0), Disposition.default
        streams = {("video", 0): video, ("audio", 0): sound, ("audio", 1): other}
        packets = [
            (packet.dts * packet.time_base, number, packet)
            for number, file in enumerate((first, second))
            for packet in file.demux()
            if packet.size and packet.dts is not None
        ]
        for _, number, packet in sorted(packets, key=lambda p: p[0]):
            if target := streams.get((packet.stream.type, number)):
                packet.stream = target
                new.mux_one(packet)
    return path


def interlaced(tmp: Path) -> Path:
    return plain(tmp / "a.mp4", options={"bf": "0", "x264-params": "tff=1"})


@dataclass(frozen=True)
class Kind:
    """What is right: frames, the first times (or all), when the last goes, when beeps sound."""

    make: Callable[[Path], Path]
    frames: int = 30
    times: tuple[float, ...] = (0, 0.1, 0.2)
    end: float | None = None
    sound: tuple[float, ...] = (0.5, 1.5, 2.5)
    codec: str = "aac"
    warning: str | None = None


MONO = ("mp2", 48_000, "mono")
FOUR = (0.5, 1.5, 2.5, 3.5)
KINDS = {
    "sound that repeats a time": Kind(repeated_sound),
    "sound that steps back": Kind(
        lambda tmp: mistimed(plain(tmp / "a.mkv"), "audio", 60, -500)
    ),
    "sound to encode that steps back": Kind(
        lambda tmp: mistimed(plain(tmp / "a.mkv", sound_codec="mp2"), "audio", 60, -500)
    ),
    "program streams joined": Kind(
        joined_program_streams, 100, (0, 0.04, 0.08), end=4, sound=FOUR,
        warning="times of 2 of 100 frames",  # FFmpeg's own guess, of frames without time stamps
    ),
    "transport streams joined": Kind(
        lambda tmp: changing_sound(tmp, MONO, MONO), 40, end=4, sound=FOUR
    ),
    "MP2 in a transport stream": Kind(
        lambda tmp: stream_file(tmp / "a.ts", sound=MONO), 20, sound=FOUR[:2]
    ),
    "mono becomes stereo": Kind(
        lambda tmp: changing_sound(tmp, MONO, ("mp2", 48_000, "stereo")), 40, sound=FOUR
    ),
    "48 kHz becomes 32 kHz": Kind(
        lambda tmp: changing_sound(tmp, MONO, ("mp2", 32_000, "mono")), 40, sound=FOUR
    ),
    "AAC that becomes stereo": Kind(
        lambda tmp: changing_sound(tmp, ("aac", 48_000, "mono"), ("aac", 44_100, "stereo")),
        40, sound=FOUR,
    ),
    "an open group, cut, in Matroska": Kind(
        lambda tmp: cut_open(tmp, "mkv"), 36, sound=(), warning="2 packets before its first picture"
    ),
    "a stream that begins midway": Kind(
        begun_midway, 18, sound=(0.3, 1.3), warning="5 packets before its first picture"
    ),
    "a broken SEI": Kind(broken_sei),
    "pictures repeated by empty packets": Kind(
        repeated_pictures, 6, (0, 0.1, 0.2, 0.3, 0.6, 0.7), sound=()
    ),
    "packets without a picture, in AVI": Kind(
        not_coded, 16, (0, *(n / 10 for n in range(2, 9)), 1.3), end=2.1, codec="mp3",
        sound=FOUR[:2],
    ),
    "sound that outlasts a slide": Kind(
        lambda tmp: plain(tmp / "a.mp4", 1, sound=beeps([0.5, 2.5], 3)), 10, end=3,
        sound=(0.5, 2.5),
    ),
    "pictures ahead of their time, in AVI": Kind(
        lambda tmp: stream_file(
            tmp / "a.avi", sound=("libmp3lame", 48_000, "mono"), options={"bf": "2", "g": "12"}
        ),
        20, end=2, codec="mp3", sound=FOUR[:2],
    ),
    "transport streams joined, with B-frames": Kind(
        lambda tmp: joined(
            tmp / "c.ts", *[stream_file(tmp / f"{n}.ts", options={"bf": "2"}) for n in "ab"]
        ),
        40, end=4, sound=(),
    ),
    "one bad time": Kind(bad_time, warning="times of 1 of 30 frames"),
    "one bad time, from 20 s on": Kind(
        lambda tmp: bad_time(tmp, 20), warning="times of 1 of 30 frames"
    ),
    "a start at 20 s": Kind(
        lambda tmp: remuxed(plain(tmp / "a.mkv"), tmp / "b.mkv", starting_at(20))
    ),
    "a slide that stays, in mp4": Kind(
        lambda tmp: still(tmp / "a.mp4", 5), 3, (0, 1, 2), 5, (0.5, 4.5)
    ),
    "a slide that stays, in mov": Kind(
        lambda tmp: still(tmp / "a.mov", 5), 3, (0, 1, 2), 5, (0.5, 4.5)
    ),
    "an animation": Kind(animation, 3, (0, 0.1, 0.3), 2.8, ()),
    "two sounds": Kind(two_sounds, sound=(1.2,)),
    "interlaced": Kind(interlaced, warning="it is interlaced, so moving edges are combed"),
    "an odd rate": Kind(
        lambda tmp: stream_file(tmp / "a.avi", frames=4, rate=999, codec="mpeg4"),
        4, (0, 1 / 999, 2 / 999), sound=(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_kind_of_file_is_read_and_written(tmp_path: Path, kind: Kind) -> None:
    path = kind.make(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        clip: Clip = read_clip(path)
        copy = write_clip(tmp_path / "copy" / "copy.mp4", clip)
    said = [str(w.message) for w in caught]
    assert len(said) == (kind.warning is not None), said
    assert kind.warning is None or kind.warning in said[0]
    assert len(clip) == kind.frames
    assert [float(t) for t in clip.times[: len(kind.times)]] == pytest.approx(kind.times, abs=0.002)
    assert kind.end is None or float(clip.end) == pytest.approx(kind.end, abs=0.06)
    again = read_clip(copy)
    assert [float(t) for t in again.times] == pytest.approx(
        [float(t) for t in clip.times], abs=1e-4
    )
    assert float(again.end) == pytest.approx(float(clip.end), abs=1e-4)
    if not kind.sound:
        assert again.audio is None
        return
    codec, onsets = heard(copy)
    assert (codec, onsets) == (kind.codec, pytest.approx(kind.sound, abs=SYNC))
    with av.open(str(copy)) as container:
        times = [p.dts for p in container.demux(audio=0) if p.size]
    assert times == sorted(set(times))


def hdr(path: Path, transfer: int, nits: Sequence[float], codes: Sequence[float]) -> Path:
    """Grey patches, 16 pixels wide, of these codes (0..1), in 10 bits and BT.2020."""
    with av.open(str(path), "w") as output:
        stream = output.add_stream("ffv1", rate=10, pix_fmt="yuv420p10le")
        stream.width, stream.height = 16 * len(codes), 16
        context = stream.codec_context
        context.color_trc, context.color_primaries = transfer, ColorPrimaries.BT2020
        context.colorspace, context.color_range = Colorspace.BT2020, ColorRange.MPEG
        frame = av.VideoFrame(stream.width, 16, "yuv420p10le")
        for number, plane in enumerate(frame.planes):
            values = np.full((plane.height, plane.line_size // 2), 512, np.uint16)
            if number == 0:
                luma = np.round(64 + 876 * np.asarray(codes)).repeat(16)
                values[:, : len(luma)] = luma
            plane.update(values.tobytes())
        frame.colorspace, frame.color_range = Colorspace.BT2020, ColorRange.MPEG
        frame.pts, frame.time_base = 0, Fraction(1, 10)
        output.mux(stream.encode(frame) + stream.encode(None))
    return path


# codes of 1, 100, 203, 400 and 1000 cd/m²: PQ by SMPTE ST 2084, HLG by ITU-R BT.2100 at 1000 cd/m²
NITS = (1, 100, 203, 400, 1000)
HIGH = {
    "PQ": (ColorTrc.SMPTE2084, (0.1499, 0.5081, 0.5807, 0.6526, 0.7518)),
    "HLG": (ColorTrc.ARIB_STD_B67, (0.0974, 0.6283, 0.7502, 0.8575, 1.0)),
}


@pytest.mark.parametrize("name", HIGH)
def test_high_dynamic_range_becomes_standard(tmp_path: Path, name: str) -> None:
    transfer, codes = HIGH[name]
    path = hdr(tmp_path / "a.mkv", transfer, NITS, codes)
    with pytest.warns(UserWarning, match=rf"its high dynamic range \({name}\) is converted") as all:
        image = read_clip(path).frames[0] * 255
    assert len(all) == 1
    grey = image[:, 8, 8::16]
    assert float((grey - grey[1]).abs().max()) <= 1
    dark, hundred, white, bright, brightest = grey[1].tolist()
    # a display's gamma of 2.4: 255 (1 / 203)^(1/2.4) and 255 (100 / 203)^(1/2.4); the codes above
    # have four digits, which in the dark are a level
    assert (dark, hundred) == pytest.approx((27.9, 189.8), abs=1.5)
    assert 240 <= white <= 248  # 0.9 of reference white
    assert white + 5 <= bright < brightest <= 255


def test_wide_gamut_keeps_grey_and_gains_saturation(tmp_path: Path) -> None:
    path = hdr(tmp_path / "a.mkv", ColorTrc.BT2020_10, NITS, (0, 0.25, 0.5, 0.75, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grey = read_clip(path).frames[0, :, 8, 8::16] * 255
    assert grey[1].tolist() == pytest.approx([0, 63.75, 127.5, 191.25, 255], abs=1)
    frame = av.VideoFrame.from_ndarray(np.full((8, 8, 3), (200, 60, 60), np.uint8))
    plain = colour.rgb(frame, "")[:, 0, 0].tolist()
    frame.color_primaries = ColorPrimaries.BT2020
    red, green, blue = colour.rgb(frame, "")[:, 0, 0].tolist()
    assert plain == [200, 60, 60]
    assert red > 200 + 10
    assert green < 60
    assert blue <= 61


@pytest.mark.parametrize(("matrix", "name"), [(8, "ycgco"), (10, "bt2020c"), (14, "ictcp")])
def test_a_matrix_that_is_not_converted_is_refused_by_name(matrix: int, name: str) -> None:
    frame = av.VideoFrame(16, 16, "yuv420p")
    frame.colorspace = matrix
    with pytest.raises(VideoError, match=rf"^here: expected colours in a matrix .* got {name};"):
        colour.rgb(frame, "here")


def test_a_matrix_of_rgb_on_other_formats_counts_as_untagged() -> None:
    frame = av.VideoFrame.from_ndarray(noise(1)[0]).reformat(
        format="yuv444p", dst_colorspace=Colorspace.ITU601
    )
    frame.colorspace = 2
    untagged = colour.rgb(frame, "")
    frame.colorspace = 0
    assert torch.equal(colour.rgb(frame, ""), untagged)


def test_an_empty_packet_does_not_end_the_decoder(tmp_path: Path) -> None:
    """As Theora has them where a picture is shown on."""
    path = plain(tmp_path / "a.mkv", 1)
    with av.open(str(path)) as container:
        packets = list(container.demux(video=0))
        empty = Packet(b"")
        empty.pts = empty.dts = packets[4].dts
        empty.stream, empty.time_base = packets[4].stream, packets[4].time_base
        assert len(list(clean_frames([*packets[:4], empty, *packets[4:]]))) == 10


CUSTOM_LAYOUT = """
import sys, warnings
from tokenflow.video import read_clip, write_clip
warnings.simplefilter("error")
for source in sys.argv[1:]:
    write_clip(source.replace(".mov", ".mp4"), read_clip(source))
"""
LAYOUTS = ("2.1", "4.0", "5.0(side)", "5.1(side)", "6.1", "7.1", "7.1(wide)", "hexagonal")


def test_a_layout_of_its_own_does_not_end_the_process(tmp_path: Path) -> None:
    """In a process of its own, as PyAV aborts it where such a layout is asked for its name."""
    sources = [
        stream_file(tmp_path / f"{layout}.mov", codec="mpeg4", sound=("pcm_s16le", 48_000, layout))
        for layout in LAYOUTS
    ]
    words = [sys.executable, "-c", CUSTOM_LAYOUT, *map(str, sources)]
    assert subprocess.run(words, check=False, capture_output=True, text=True).stderr == ""
    for layout in LAYOUTS:
        copy = tmp_path / f"{layout}.mp4"
        assert heard(copy) == ("aac", pytest.approx(FOUR[:2], abs=SYNC)), layout
        with av.open(str(copy)) as container:
            assert container.streams.audio[0].layout.name == "stereo"


def test_a_cover_picture_is_not_the_videos_alpha(tmp_path: Path) -> None:
    Image.new("RGBA", (16, 16), (0, 0, 0, 0)).save(tmp_path / "cover.png")
    path = tmp_path / "a.mp4"
    with (
        av.open(str(plain(tmp_path / "plain.mp4"))) as source,
        av.open(str(tmp_path / "cover.png"), format="png_pipe") as cover,
        av.open(str(path), "w") as output,
    ):
        video = output.add_stream_from_template(source.streams.video[0])
        picture = output.add_stream_from_template(cover.streams.video[0])
        picture.disposition = Disposition.attached_pic
        for stream, packets in ((picture, cover.demux()), (video, source.demux(video=0))):
            for packet in packets:
                if packet.size:
                    packet.stream = stream
                    output.mux_one(packet)
    with av.open(str(path)) as container:
        assert len(container.streams.video) == 2
    assert transparent(path) is None
    assert len(read_clip(path)) == 30


def test_a_rate_beyond_reason_is_refused(tmp_path: Path) -> None:
    path = stream_file(tmp_path / "a.mov", frames=4, rate=2000)
    with pytest.raises(VideoError, match="at most 1000 frames per second, got 2000"):
        read_clip(path)
    clip = read_clip(stream_file(tmp_path / "b.avi", frames=4, rate=10, codec="mpeg4"))
    with pytest.raises(VideoError, match="at most 1000 frames per second, got 1001"):
        write_video(tmp_path / "b.mp4", clip.frames, clip.times, Fraction(1001))


def test_a_file_that_starts_late_is_not_cut_short(tmp_path: Path) -> None:
    path = remuxed(plain(tmp_path / "a.mkv"), tmp_path / "b.mkv", starting_at(60))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(read_clip(path)) == 30


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda path: make_video(path, noise(12)[::-1].copy()), "frame 2 is another"),
        (lambda path: make_video(path, noise(6)), "it has 6 of 12 frames"),
        (lambda path: path.write_bytes(path.read_bytes()[:2000]), "is not a video"),
    ],
    ids=["another", "shorter", "cut"],
)
def test_a_source_that_changes_while_it_is_edited(tmp_path, monkeypatch, change, reason) -> None:
    path = make_video(tmp_path / "a.mp4", noise(12))
    monkeypatch.setattr(reader, "BUDGET", 2 * 4 * 3 * 48 * 64)
    clip = read_clip(path, in_memory=False)
    change(path)
    with pytest.raises(VideoError, match=rf"has changed since it was read first .*{reason}"):
        clip.frames[:]


def test_the_sound_of_a_source_that_changed_is_left_out(tmp_path: Path) -> None:
    path = plain(tmp_path / "a.mp4")
    clip = read_clip(path)
    plain(path, 2)
    with pytest.warns(UserWarning, match="left out or cut short: it has changed"):
        copy = write_clip(tmp_path / "copy.mp4", clip)
    assert read_clip(copy).audio is None
