from fractions import Fraction
from pathlib import Path

import pytest
import torch

from tokenflow.video import AudioSpan, VideoError, read_clip, video_file

from .making import as_frames, beeps, make_video, noise

WOMAN_RUNNING = Path(__file__).parents[3] / "shared" / "data" / "woman-running.mp4"


@pytest.fixture(scope="module")
def ten(tmp_path_factory) -> Path:
    """Ten lossless frames of 48x64 (height x width), 10 per second."""
    return make_video(tmp_path_factory.mktemp("video") / "ten.mp4", noise(10))


def test_a_whole_file(ten):
    clip = read_clip(ten)
    assert torch.equal(clip.frames, as_frames(noise(10)))
    assert clip.frames.dtype == torch.float32
    assert clip.times == tuple(Fraction(n, 10) for n in range(10))
    assert (clip.rate, clip.name, clip.display_size) == (10, "ten", (48, 64))
    assert clip.audio is None


@pytest.mark.parametrize(
    ("asked", "chosen"),
    [
        ({"start": 3}, [3, 4, 5, 6, 7, 8, 9]),
        ({"stop": 10, "stride": 4}, [0, 4, 8]),
        ({"start": 1, "stop": 7, "stride": 2}, [1, 3, 5]),
        ({"start": 2, "max_frames": 3}, [2, 3, 4]),
        ({"stride": 3, "max_frames": 9}, [0, 3, 6, 9]),
        ({"start": 9}, [9]),
    ],
)
def test_choosing_frames(ten, asked, chosen):
    clip = read_clip(ten, **asked)
    assert torch.equal(clip.frames, as_frames(noise(10))[chosen])
    assert clip.times == tuple(Fraction(n - chosen[0], 10) for n in chosen)
    assert clip.rate == Fraction(10, asked.get("stride", 1))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"start": 10}, r"has 10 frames \(0 to 9\), got start=10"),
        ({"stop": 11}, r"has 10 frames \(0 to 9\), got stop=11"),
        ({"start": 20, "stop": 21}, "got start=20"),
        ({"start": -1}, "start to be at least 0, got -1"),
        ({"start": 4, "stop": 4}, "stop to be at least 5, got 4"),
        ({"stride": 0}, "stride to be at least 1, got 0"),
        ({"max_frames": 0}, "max_frames to be at least 1"),
        ({"resolution": 0}, "resolution to be at least 1"),
        ({"multiple": 0}, "multiple to be at least 1"),
        ({"image_rate": 0}, r"image_rate to be from 0\.0001 to 1000 frames per second, got 0"),
        ({"image_rate": 1e-9}, "got 1e-09"),
        ({"image_rate": float("nan")}, "got nan"),
        ({"image_rate": float("inf")}, "got inf"),
    ],
)
def test_asking_for_what_is_not_there(ten, asked, message):
    with pytest.raises(VideoError, match=message):
        read_clip(ten, **asked)


def test_a_fit_that_does_not_exist(ten):
    # TypeError where the annotations are checked, too.
    with pytest.raises((VideoError, TypeError), match="fit"):
        read_clip(ten, fit="stretch")


def test_working_size_and_display_size(ten):
    clip = read_clip(ten, resolution=36, multiple=16)
    assert clip.frames.shape == (10, 3, 32, 48)
    assert clip.display_size == (36, 48)
    cropped = read_clip(ten, resolution=36, multiple=16, fit="crop")
    assert cropped.frames.shape == (10, 3, 32, 48)
    assert cropped.display_size == (32, 48)
    # 36 rows scaled from 48, of which the middle 32 are kept: compare with the picture's middle.
    whole = read_clip(ten, resolution=36).frames
    assert torch.equal(cropped.frames, whole[:, :, 2:34])


def test_an_odd_size_is_read_as_it_is(tmp_path):
    pixels = noise(2, 33, 47)
    clip = read_clip(make_video(tmp_path / "a.mp4", pixels))
    assert torch.equal(clip.frames, as_frames(pixels))
    assert clip.display_size == (34, 48)


def test_wide_pixels_become_square(tmp_path):
    path = make_video(tmp_path / "a.mp4", noise(1), pixel_aspect=Fraction(3, 2))
    clip = read_clip(path, resolution=24)
    assert clip.frames.shape == (1, 3, 24, 48)
    assert clip.display_size == (24, 48)


def test_only_chosen_frames_are_converted(ten, monkeypatch):
    converted = []
    upright = video_file._upright

    def watched(what, frame, *orientation):
        converted.append(frame.time)
        return upright(what, frame, *orientation)

    monkeypatch.setattr(video_file, "_upright", watched)
    read_clip(ten, start=2, stride=3)
    assert converted == [0.2, 0.5, 0.8]


def test_the_sound_that_belongs_to_the_frames(tmp_path):
    path = make_video(tmp_path / "a.mp4", noise(10), sound=beeps([], 1))
    state = (path.stat().st_size, path.stat().st_mtime_ns)
    assert read_clip(path).audio == AudioSpan(path, Fraction(0), Fraction(1), state)
    part = read_clip(path, start=2, stop=8, stride=2)  # frames 2, 4, 6; the last until 0.8 s
    assert part.audio == AudioSpan(path, Fraction(2, 10), Fraction(8, 10), state)


def test_the_real_clip():
    if not WOMAN_RUNNING.exists():
        pytest.skip(f"needs {WOMAN_RUNNING.name} beside the checkout, in shared/data")
    clip = read_clip(WOMAN_RUNNING, start=100, stride=5, resolution=128, multiple=64)
    assert clip.frames.shape == (4, 3, 128, 128)
    assert clip.times == (0, Fraction(1, 4), Fraction(2, 4), Fraction(3, 4))
    assert (clip.rate, clip.name, clip.display_size) == (4, "woman-running", (128, 128))
    assert clip.frames.std() > 0.1
    with pytest.raises(VideoError, match=r"has 120 frames \(0 to 119\)"):
        read_clip(WOMAN_RUNNING, start=120, resolution=64)
