from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.video.making import damaged_png, make_video, noise
from tokenflow.video.alpha import transparent


def save(folder: Path, *alphas: int | None) -> Path:
    """Images with an alpha channel of these values, or without one."""
    folder.mkdir()
    for i, alpha in enumerate(alphas):
        image = Image.fromarray(noise(1)[0])
        if alpha is not None:
            image.putalpha(alpha)
        image.save(folder / f"{i}.png")
    return folder


def test_images_without_transparency(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    assert transparent(save(tmp_path / "opaque", None, 255, None)) is None
    assert transparent(tmp_path / "images") is None


@pytest.mark.parametrize("alpha", [0, 254])
def test_the_first_transparent_image_is_named(tmp_path: Path, alpha: int) -> None:
    assert transparent(save(tmp_path / "images", 255, alpha, 0)) == "1.png"


def test_a_single_transparent_pixel(tmp_path: Path) -> None:
    folder = save(tmp_path / "images", 255)
    with Image.open(folder / "0.png") as image:
        image.putpixel((3, 4), (1, 2, 3, 200))
        image.save(folder / "0.png")
    assert transparent(folder) == "0.png"


def test_a_palettes_transparent_colour(tmp_path: Path) -> None:
    image = Image.new("P", (8, 8), 1)
    image.putpixel((0, 0), 0)
    image.save(tmp_path / "0.png", transparency=0)
    assert transparent(tmp_path) == "0.png"


def test_other_files_are_passed_over(tmp_path: Path) -> None:
    folder = save(tmp_path / "images", 255)
    (folder / "notes.txt").write_text("no image")
    (folder / "9.png").write_text("no image either")
    damaged_png(folder / "8.png")
    assert transparent(folder) is None


def test_videos(tmp_path: Path) -> None:
    frames: np.ndarray = noise(2)
    plain = make_video(tmp_path / "plain.mp4", frames)
    alpha = make_video(tmp_path / "alpha.mkv", frames, codec="ffv1", pixels="yuva420p", options={})
    assert transparent(plain) is None
    assert transparent(alpha) == "alpha.mkv"
