from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from tests.video.making import as_frames, make_video, noise
from tokenflow.editors import Canny, ControlVideo
from tokenflow.errors import InputError
from tokenflow.video import Clip, Frames, levels, read_clip, resized

SIZE = (32, 64)


@pytest.fixture
def clip() -> Clip:
    """Six frames of 32×64 pixels."""
    return Clip.from_frames(as_frames(noise(6, *SIZE)))


def images(folder: Path, frames: np.ndarray) -> Path:
    """A folder of images."""
    folder.mkdir()
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"{i}.png")
    return folder


def square(inside: tuple[float, ...], outside: tuple[float, ...]) -> Clip:
    """One frame of 32×32 with a square from 8 to 24 in it."""
    frame = torch.tensor(outside)[:, None, None].expand(3, 32, 32).clone()
    frame[:, 8:24, 8:24] = torch.tensor(inside)[:, None, None]
    return Clip.from_frames(frame[None])


def test_canny_draws_outlines_white_on_black() -> None:
    (edges,) = Canny().of(square((1.0, 1.0, 1.0), (0.0, 0.0, 0.0)))
    assert edges.shape == (3, 32, 32)
    assert set(edges.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(edges[0], edges[1])
    y, x = edges[0].nonzero().T
    ring = torch.maximum((y - 15.5).abs(), (x - 15.5).abs())
    assert ((ring - 8).abs() <= 1).all()  # within a pixel of the square's sides
    assert len(y) >= 4 * 14


def test_canny_sees_colours_of_the_same_brightness() -> None:
    gray = 0.299 * 0.8
    edges = Canny().of(square((0.8, 0.0, 0.0), (0.0, gray / 0.587, 0.0)))
    assert edges.sum() > 0


def test_canny_is_opencvs_of_each_frame(clip: Clip) -> None:
    edges = Canny(30.0, 60.0).of(clip)
    for shown, frame in zip(edges, noise(6, *SIZE), strict=True):
        assert np.array_equal((255 * shown[0]).byte().numpy(), cv2.Canny(frame, 30, 60))
    assert edges.shape == clip.frames.shape
    assert Canny(100.0, 200.0).of(clip).sum() < edges.sum()


@pytest.mark.parametrize(("low", "high"), [(-1.0, 5.0), (200.0, 100.0), (float("nan"), 1.0)])
def test_thresholds_out_of_order(low: float, high: float) -> None:
    with pytest.raises(InputError, match=r"0 <= low <= high, got low .* and high"):
        Canny(low, high)


def test_a_control_videos_frames_are_the_clips(tmp_path: Path, clip: Clip) -> None:
    path = make_video(tmp_path / "control.mp4", noise(6, *SIZE))
    assert torch.equal(ControlVideo(str(path)).of(clip), read_clip(path).frames)
    folder = images(tmp_path / "images", noise(6, *SIZE)[::-1])
    assert torch.equal(ControlVideo(str(folder)).of(clip), clip.frames.flip(0))


def test_the_part_of_a_control_video_that_is_asked_for(tmp_path: Path, clip: Clip) -> None:
    frames = noise(15, *SIZE)
    path = str(images(tmp_path / "images", frames))
    shown = ControlVideo(path, start=2, stop=14, stride=2).of(clip)
    assert torch.equal(shown, as_frames(frames)[2:14:2])


@pytest.mark.parametrize("size", [(16, 32), (64, 128), (48, 96), (33, 65)])
def test_another_size_of_the_same_aspect_is_scaled(
    tmp_path: Path, clip: Clip, size: tuple[int, int]
) -> None:
    frames = noise(6, *size)
    shown = ControlVideo(str(images(tmp_path / "images", frames))).of(clip)
    scaled = torch.stack([resized(frame, SIZE) for frame in as_frames(frames)])
    assert torch.equal(shown, levels(scaled) / 255)
    assert shown.shape == clip.frames.shape


def test_the_aspect_is_that_of_the_source_that_was_stretched(tmp_path: Path) -> None:
    frames = noise(3, 50, 70)
    clip = read_clip(images(tmp_path / "source", frames), multiple=32)
    assert clip.frames.shape[-2:] == (64, 64)
    control = images(tmp_path / "control", frames)
    assert ControlVideo(str(control)).of(clip).shape == clip.frames.shape


def test_the_same_is_cut_off_as_of_a_clip_that_was_cropped(tmp_path: Path) -> None:
    path = str(images(tmp_path / "images", noise(2, 65, 128)))
    clip = read_clip(path, multiple=16, fit="crop")
    assert clip.frames.shape[-2:] == (64, 128)
    assert torch.equal(ControlVideo(path).of(clip), clip.frames)


def transparent_images(folder: Path) -> Path:
    images(folder, noise(6, *SIZE))
    with Image.open(folder / "3.png") as image:
        image.putalpha(128)
        image.save(folder / "3.png")
    return folder


def alpha_video(path: Path) -> Path:
    return make_video(
        path.with_suffix(".mkv"), noise(6, *SIZE), codec="ffv1", pixels="yuva420p", options={}
    )


BAD: dict[str, tuple[Callable[[Path], Path], dict[str, Any], str]] = {
    "shorter": (lambda p: images(p, noise(5, *SIZE)), {}, r"each of the clip's 6, found only 5; "),
    "longer": (lambda p: images(p, noise(7, *SIZE)), {}, r"clip's 6, found more; give it .* stop"),
    "a shorter part": (
        lambda p: images(p, noise(6, *SIZE)),
        {"stride": 2},
        r"each of the clip's 6, found only 3",
    ),
    "outside": (lambda p: images(p, noise(6, *SIZE)), {"start": 6}, "has 6 frames"),
    "another aspect": (
        lambda p: images(p, noise(6, 32, 60)),
        {},
        "is 60x32, expected the aspect of the clip's 64x32; crop or pad",
    ),
    "transparent images": (transparent_images, {}, r"alpha channel \(in 3\.png\).* flatten it"),
    "a transparent video": (alpha_video, {}, r"alpha channel \(in control\.mkv\).* flatten it"),
    "nothing": (lambda p: p, {}, "expected a video file or a folder of images, found nothing"),
    "no images": (lambda p: (p.mkdir(), p)[1], {}, "expected images .* found none"),
    "no video": (lambda p: (p.write_text("text"), p)[1], {}, "not a video that can be read"),
}


@pytest.mark.parametrize("case", BAD)
def test_control_videos_that_do_not_fit(case: str, tmp_path: Path, clip: Clip) -> None:
    make, part, message = BAD[case]
    path = make(tmp_path / "control")
    with pytest.raises(InputError, match=message):
        ControlVideo(str(path), **part).of(clip)


def test_an_opaque_alpha_channel_does_no_harm(tmp_path: Path, clip: Clip) -> None:
    folder = images(tmp_path / "images", noise(6, *SIZE))
    with Image.open(folder / "0.png") as image:
        image.putalpha(255)
        image.save(folder / "0.png")
    assert torch.equal(ControlVideo(str(folder)).of(clip), clip.frames)


def test_control_images_of_a_long_clip_are_made_when_they_are_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (4, 32, 48, 3), dtype=np.uint8)
    path = str(images(tmp_path / "control", frames))
    clip = read_clip(path).part(range(1, 4))
    for condition in (Canny(), ControlVideo(path)):
        small = condition.of(clip)
        monkeypatch.setattr("tokenflow.video.frames.BUDGET", 0)
        large = condition.of(clip)
        monkeypatch.undo()
        assert isinstance(small, torch.Tensor)
        assert isinstance(large, Frames)
        assert torch.equal(large[[2, 0]], small[[2, 0]])
