import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image

from tokenflow.video import VideoError, image_folder, read_clip

from .making import as_frames, damaged_png, noise


def save(folder, names, pixels):
    folder.mkdir(exist_ok=True)
    for name, pixel in zip(names, pixels, strict=True):
        Image.fromarray(pixel).save(folder / name)
    return folder


def test_images_are_frames_in_natural_order(tmp_path):
    names = ["f1.png", "f2.PNG", "f10.bmp", "f11.png"]
    folder = save(tmp_path / "walk.cycle", names, noise(4))
    (folder / "notes.txt").write_text("passed over")
    clip = read_clip(folder, image_rate=23.976)
    assert torch.equal(clip.frames, as_frames(noise(4)))
    assert clip.rate == Fraction(2997, 125)
    assert clip.times[3] == 3 / clip.rate
    assert (clip.name, clip.audio) == ("walk.cycle", None)


def test_choosing_images_and_their_size(tmp_path):
    folder = save(tmp_path / "a", [f"{n}.png" for n in range(12)], noise(12))
    clip = read_clip(folder, start=1, stop=11, stride=4, resolution=24, multiple=16)
    assert clip.frames.shape == (3, 3, 32, 32)
    assert (clip.rate, clip.display_size) == (2, (24, 32))
    with pytest.raises(VideoError, match=r"has 12 frames \(0 to 11\), got stop=13"):
        read_clip(folder, stop=13)


def test_the_orientation_of_a_photograph_is_applied(tmp_path):
    (pixels,) = noise(1)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise by a quarter
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    clip = read_clip(tmp_path)
    clockwise = as_frames(pixels[None]).transpose(2, 3).flip(3)
    assert torch.equal(clip.frames, clockwise)


@pytest.mark.parametrize("other", [None, "notes.txt"])
def test_a_folder_without_images(tmp_path, other):
    if other:
        (tmp_path / other).write_text("no image")
    with pytest.raises(VideoError, match=r"expected images \(\.bmp, .*found none"):
        read_clip(tmp_path)


def test_images_of_different_sizes(tmp_path):
    save(tmp_path, ["0.png", "1.png"], noise(2))
    save(tmp_path, ["2.png"], noise(1, 48, 63))
    with pytest.raises(VideoError, match=r"2\.png is 63x48 and those before it 64x48"):
        read_clip(tmp_path)


def test_a_broken_image(tmp_path):
    save(tmp_path, ["0.png"], noise(1))
    data = (tmp_path / "0.png").read_bytes()
    (tmp_path / "1.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "2.png").write_bytes(b"no image")
    for start in (1, 2):
        with pytest.raises(VideoError, match=rf"{start}\.png is not an image that can be read"):
            read_clip(tmp_path, start=start)


def test_a_text_that_is_too_long(tmp_path: Path) -> None:
    damaged_png(tmp_path / "0.png")
    with pytest.raises(VideoError, match=r"0\.png is not an image that can be read \(Decomp"):
        read_clip(tmp_path)


def test_postscript_is_no_image_and_starts_no_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs, images = tmp_path / "programs", tmp_path / "images"
    programs.mkdir()
    images.mkdir()
    (programs / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path / 'started'}\n")
    (programs / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # what it found before
    Image.new("RGB", (8, 8)).save(images / "0.png", "EPS")
    with pytest.raises(VideoError, match=r"0\.png is not .*cannot identify"):
        read_clip(images)
    assert not (tmp_path / "started").exists()


def test_sixteen_bits_are_refused_rather_than_cut_off(tmp_path):
    Image.new("I;16", (8, 8), 40_000).save(tmp_path / "0.png")
    with pytest.raises(VideoError, match="expected 8 bits per channel"):
        read_clip(tmp_path)


def test_an_image_that_is_too_large(tmp_path, monkeypatch):
    save(tmp_path, ["0.png"], noise(1))
    monkeypatch.setattr(image_folder, "MAX_PIXELS", 64 * 48 - 1)
    with pytest.raises(VideoError, match="at most 3071 pixels, got 64x48"):
        read_clip(tmp_path)


def test_grey_of_16_bits_keeps_its_levels_where_they_are_asked_for(tmp_path):
    levels = np.arange(65000, 65000 + 64, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(levels).save(tmp_path / "0.png")
    frame = read_clip(tmp_path, deep=True).frames[0]
    assert frame.shape == (3, 8, 8)
    expected = torch.from_numpy(levels.astype(np.float64) / 65535)
    assert torch.allclose(frame.double(), expected.expand(3, 8, 8), rtol=0, atol=1e-7)
    rows = np.zeros((8, 8, 3), np.uint8)
    Image.fromarray(rows).save(tmp_path / "1.png")
    both = read_clip(tmp_path, deep=True).frames
    assert both[1].max() == 0
