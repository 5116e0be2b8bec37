import warnings
from fractions import Fraction

import av
import pytest

from tokenflow.video import AudioSpan, audio, read_clip, write_video

from .making import SAMPLE_RATE, as_frames, beeps, heard, make_video, noise

# A beep is found where its rise passes a threshold: codecs blur that by a few samples, and
# Matroska rounds times to a millisecond. One lost or extra packet would be 20 ms off.
EXACT = 8 / SAMPLE_RATE
MATROSKA = 0.001


def write(path, clip):
    return write_video(path, clip.frames, clip.times, clip.rate, audio=clip.audio)


@pytest.mark.parametrize(
    ("name", "codec", "written", "tolerance"),
    [
        ("a.mp4", "aac", "aac", EXACT),
        ("a.mkv", "aac", "aac", MATROSKA),
        ("a.mkv", "libopus", "opus", MATROSKA),
        ("a.mkv", "flac", "flac", MATROSKA),
        ("a.ts", "aac", "aac", EXACT),
        ("a.mov", "pcm_s16le", "aac", EXACT),
    ],
)
def test_sound_stays_aligned_with_the_picture(tmp_path, name, codec, written, tolerance):
    source = make_video(
        tmp_path / name,
        noise(30),
        codec="libx264",
        pixels="yuv420p",
        sound=beeps([0.5, 1.5, 2.5], 3),
        sound_codec=codec,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = write(tmp_path / "whole.mp4", read_clip(source))
        part = write(tmp_path / "part.mp4", read_clip(source, start=11, stop=20))
    assert heard(whole) == (written, pytest.approx([0.5, 1.5, 2.5], abs=tolerance))
    assert heard(part) == (written, pytest.approx([0.4], abs=tolerance))


def test_sound_is_copied_not_encoded_again(tmp_path):
    source = make_video(tmp_path / "a.mp4", noise(10), sound=beeps([0.5], 1))
    copy = write(tmp_path / "b.mp4", read_clip(source))

    def packets(path):
        with av.open(str(path)) as container:
            return [bytes(p) for p in container.demux(audio=0) if p.size]

    assert packets(copy) == packets(source)


def test_the_picture_does_not_wait_for_sound_that_has_ended(tmp_path):
    source = make_video(tmp_path / "a.mp4", noise(20), sound=beeps([0.2], 0.5))
    copy = read_clip(write(tmp_path / "b.mp4", read_clip(source, start=10)))
    assert copy.audio is None
    assert len(copy) == 10
    assert copy.times[-1] == Fraction(9, 10)


def test_sound_that_cannot_be_read_is_left_out_with_a_warning(tmp_path):
    silent = make_video(tmp_path / "silent.mp4", noise(2))
    frames = as_frames(noise(2))
    for path, reason in ((tmp_path / "gone.mp4", "No such file"), (silent, "it has none")):
        span = AudioSpan(path, Fraction(0), Fraction(1))
        with pytest.warns(UserWarning, match=f"{path.name} is left out or cut short: .*{reason}"):
            write_video(
                tmp_path / "b.mp4", frames, (Fraction(0), Fraction(1, 8)), Fraction(8), audio=span
            )
        assert len(read_clip(tmp_path / "b.mp4")) == 2


def test_damage_costs_the_sound_no_more_than_it_hits(tmp_path, monkeypatch):
    source = make_video(
        tmp_path / "a.mkv",
        noise(30),
        sound=beeps([0.5, 2.5], 3),
        damage_sound=lambda index, data: b"\xff" * len(data) if index == 60 else data,
    )
    monkeypatch.setattr(audio, "COPIED", set())  # so that the sound has to be decoded
    with pytest.warns(UserWarning, match=r"a\.mkv .* cut short: 1 of its packets cannot be dec"):
        write(tmp_path / "b.mp4", read_clip(source))
    assert heard(tmp_path / "b.mp4") == ("aac", pytest.approx([0.5, 2.5], abs=MATROSKA))
    assert len(read_clip(tmp_path / "b.mp4")) == 30
