import dataclasses
import math
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

from tokenflow.video import (
    AudioSpan,
    Clip,
    VideoError,
    read_clip,
    require_writable,
    write_image,
    write_video,
)

from .making import as_frames, noise

EVEN = tuple(Fraction(n, 8) for n in range(4))


def write(path, **changes):
    """Write four good frames at 8 per second, but for the changes."""
    given = {"frames": as_frames(noise(4)), "times": EVEN, "rate": Fraction(8), **changes}
    return write_video(path, given.pop("frames"), given.pop("times"), given.pop("rate"), **given)


def test_colour_patches_survive(tmp_path):
    colours = torch.tensor(
        [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1], [0, 0, 0], [1, 1, 0], [0.8, 0.4, 0.2]]
    )
    frame = colours.T[:, None, :].repeat_interleave(32, 1).repeat_interleave(16, 2)
    path = write(tmp_path / "a.mp4", frames=frame.expand(4, 3, -1, -1), crf=0)
    centres = read_clip(path).frames[:, :, 16, 8::16]
    error = (centres - colours.T).abs().max() * 255
    # Away from edges only the rounding of Y, Cb and Cr is left: half a level each, times the
    # largest gains of BT.709's inverse (1.16 and 2.1), and 8-bit rounding on both sides.
    assert error <= math.ceil(0.5 * 1.16 + 0.5 * 2.1 + 0.5 + 0.5)


def test_red_is_stored_as_bt709_in_limited_range_and_tagged_so(tmp_path):
    red = torch.zeros(4, 3, 32, 32)
    red[:, 0] = 1
    with av.open(str(write(tmp_path / "a.mp4", frames=red))) as container:
        stream = container.streams.video[0]
        tags = (
            stream.color_range,
            stream.colorspace,
            stream.color_primaries,
            stream.color_trc,
        )
        assert tags == (1, 1, 1, 1)  # MPEG range, and BT.709 three times
        frame = next(container.decode(stream))
    assert frame.format.name == "yuv420p"
    y, u, v = (np.frombuffer(bytes(p), np.uint8)[0] for p in frame.planes)
    # BT.709's own table (63, 102, 240); one level for x264. BT.601 would be 81, 90, 240.
    assert np.abs(np.array([y, u, v], int) - [63, 102, 240]).max() <= 1


def test_pictures_survive_at_the_default_quality(tmp_path):
    grey = as_frames(noise(4, 64, 96)).mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
    back = read_clip(write(tmp_path / "a.mp4", frames=grey)).frames
    # At quantiser 16 H.264's step is 2^((16 - 4) / 6) = 4 levels, so errors are of up to 2 of the
    # 219 of limited range. Grey, since halving the chroma's resolution costs more than that.
    assert (back - grey).square().mean().sqrt() < 2 / 219


@pytest.mark.parametrize(
    "times",
    [
        [Fraction(n * 1001, 24_000) for n in range(5)],
        [Fraction(n, 1000) for n in (0, 40, 140, 173, 900)],
        [Fraction(n, 7) for n in range(5)],
        [Fraction(0)],
    ],
)
def test_times_are_kept_exactly_and_the_last_frame_lasts_one_period(tmp_path, times):
    path = write(
        tmp_path / "a.mp4", frames=as_frames(noise(len(times))), times=times, rate=Fraction(8)
    )
    assert read_clip(path).times == tuple(times)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        # One tick for a duration that is no multiple of the times' unit.
        assert abs(stream.duration * stream.time_base - times[-1] - Fraction(1, 8)) <= Fraction(
            stream.time_base
        )


def test_times_without_a_common_unit_are_kept_to_the_microsecond(tmp_path):
    clip = Clip.from_frames(as_frames(noise(4)), rate=Fraction(29.97))
    path = write_video(tmp_path / "a.mp4", clip.frames, clip.times, clip.rate)
    for time, wanted in zip(read_clip(path).times, clip.times, strict=True):
        assert abs(time - wanted) <= Fraction(1, 1_000_000)


@pytest.mark.parametrize(
    ("height", "width", "size", "expected"),
    [(33, 47, None, (34, 48)), (32, 48, (41, 31), (42, 32)), (1, 1, None, (2, 2))],
)
def test_odd_sizes_become_even(tmp_path, height, width, size, expected):
    frames = as_frames(noise(4, height, width))
    clip = read_clip(write(tmp_path / "a.mp4", frames=frames, size=size))
    assert clip.frames.shape[2:] == expected
    assert (clip.frames.mean() - frames.mean()).abs() < 0.05  # scaled, not padded in black


def test_a_clip_comes_back_at_its_display_size(tmp_path):
    frames = as_frames(noise(4, 130, 128))
    clip = read_clip(write(tmp_path / "a.mp4", frames=frames), multiple=64)
    assert clip.frames.shape[2:] == (128, 128)
    back = read_clip(
        write_video(tmp_path / "b.mp4", clip.frames, clip.times, clip.rate, size=clip.display_size)
    )
    assert back.frames.shape[2:] == (130, 128)


def test_frames_may_stream_and_be_of_any_float(tmp_path):
    frames = as_frames(noise(4))
    write(tmp_path / "a.mp4", frames=frames)
    write(tmp_path / "b.mp4", frames=iter(frames))
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    half = read_clip(write(tmp_path / "c.mp4", frames=frames.bfloat16())).frames
    assert (half - frames).abs().mean() < 0.02


def test_the_index_comes_first_so_that_a_browser_can_start(tmp_path):
    data = write(tmp_path / "a.mp4").read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")


def broken_off():
    yield from as_frames(noise(2))
    raise RuntimeError("the model gave up")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"frames": as_frames(noise(4))[:0], "times": ()}, VideoError, "got none"),
        ({"frames": iter(()), "times": ()}, VideoError, "got none"),
        ({"frames": as_frames(noise(3))}, VideoError, "each of 3 frames, got 4"),
        ({"frames": iter(as_frames(noise(3)))}, VideoError, "expected 4 frames.*got 3"),
        ({"frames": iter(as_frames(noise(5)))}, VideoError, "expected 4 frames.*got more"),
        ({"frames": iter(torch.rand(4, 1, 8, 8))}, VideoError, r"\(1, 8, 8\) for frame 0"),
        ({"times": EVEN[::-1]}, VideoError, "increase"),
        ({"rate": Fraction(0)}, VideoError, "rate greater than 0"),
        ({"crf": 52}, VideoError, "crf in 0..51, got 52"),
        ({"frames": broken_off()}, RuntimeError, "gave up"),
    ],
)
def test_a_failure_leaves_nothing_half_written(tmp_path, changes, error, message):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"the video before")
    with pytest.raises(error, match=message):
        write(path, **changes)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"the video before"


def test_the_name_must_say_mp4(tmp_path):
    with pytest.raises(VideoError, match=r"a\.avi: expected a name that ends in \.mp4"):
        write(tmp_path / "a.avi")
    assert list(tmp_path.iterdir()) == []


def test_an_image_is_written_whole(tmp_path):
    pixels = noise(1)
    image = as_frames(pixels)[0]
    path = write_image(tmp_path / "new" / "a.png", image * 1.5 - 0.1)
    expected = ((image * 1.5 - 0.1).clamp(0, 1) * 255).round().permute(1, 2, 0)
    assert np.array_equal(np.array(Image.open(path)), expected.numpy())
    assert list(path.parent.iterdir()) == [path]


def test_what_cannot_be_written_is_told_before(tmp_path):
    clip = Clip.from_frames(torch.rand(2, 3, 16, 16))
    assert require_writable(clip).times == clip.times
    with pytest.raises(VideoError, match="a video of 40000x16 cannot be written"):
        require_writable(clip, (16, 40_000))
    gone = AudioSpan(tmp_path / "gone.mp4", Fraction(0), Fraction(1))
    with pytest.warns(UserWarning, match="left out or cut short: .*No such file"):
        assert require_writable(dataclasses.replace(clip, audio=gone)).audio is None
