"""A folder of images as a source of pictures, by Pillow."""

import re
from collections.abc import Iterator
from fractions import Fraction
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps
from torch import Tensor

from tokenflow.video.clip import VideoError
from tokenflow.video.source import MAX_PIXELS, Picture, VideoSource

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
# whatever the suffix says; of all others Pillow would start Ghostscript for PostScript
FORMATS = ("BMP", "JPEG", "PNG", "WEBP")
LEVEL_16 = 257  # 65535 / 255
# of a damaged file; a text chunk that is too long is a plain ValueError
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def image_source(folder: Path, rate: Fraction, deep: bool = False) -> VideoSource:
    """The folder's images by name, 2 before 10; other files and hidden ones are passed over. Of one
    image in place of a folder, that.

    EXIF orientation is applied, transparency is dropped. Grey of 16 bits is taken if `deep`, as
    fractions of levels. VideoError names what cannot be read, and
    names whose order is not clear.
    """
    paths = image_paths(folder) if folder.is_dir() else [folder]
    if not paths:
        raise VideoError(f"{folder}: expected images ({', '.join(SUFFIXES)}), found none.")
    _require_one_order(folder, paths)
    return VideoSource(rate, _pictures(paths, rate, deep))


def image_paths(folder: Path) -> list[Path]:
    """A folder's images, in the order of their names; those that begin with a dot are hidden."""
    paths = [path for path in folder.iterdir() if _is_image(path)]
    return sorted(paths, key=_natural)


def _is_image(path: Path) -> bool:
    visible = not path.name.startswith(".")
    return visible and path.suffix.lower() in SUFFIXES and path.is_file()


def _require_one_order(folder: Path, paths: list[Path]) -> None:
    """Raises VideoError for names that count differently as decimal fractions, as 0.033 and 0.1."""
    for path, after in pairwise(paths):
        a, b = (re.split(r"(\d+\.\d+)", p.stem.lower()) for p in (path, after))
        if a[::2] == b[::2] and [float(n) for n in a[1::2]] > [float(n) for n in b[1::2]]:
            raise VideoError(
                f"{folder}: {path.name} comes before {after.name} by whole numbers, and after it "
                f"by decimal fractions; give all names as many digits behind the point."
            )


def _natural(path: Path) -> tuple[list[tuple[str, int]], str]:
    parts = re.findall(r"(\D*)(\d*)", path.stem.lower())
    return [(text, int(digits or -1)) for text, digits in parts], path.name


def _pictures(paths: list[Path], rate: Fraction, deep: bool) -> Iterator[Picture]:
    for index, path in enumerate(paths):
        read = partial(_read, path, deep)
        yield Picture(path.name, index / rate, 1 / rate, Fraction(1), read)


def _read(
    path: Path, deep: bool
) -> UInt8[Tensor, "3 height width"] | Float[Tensor, "3 height width"]:
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise VideoError(
                    f"{path}: expected at most {MAX_PIXELS} pixels, got "
                    f"{image.width}x{image.height}; scale it down first."
                )
            if deep and image.mode.startswith("I"):
                grey = np.array(ImageOps.exif_transpose(image)).astype(np.float32)
                return torch.from_numpy(grey).div(LEVEL_16).repeat(3, 1, 1)
            if image.mode.startswith(("I", "F")):
                raise VideoError(f"{path}: expected 8 bits per channel, got more; save it so.")
            pixels = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except VideoError:
        raise
    except UNREADABLE as error:
        raise VideoError(
            f"{path} is not an image that can be read ({error}); replace or remove it."
        ) from error
    return torch.from_numpy(pixels).permute(2, 0, 1)
