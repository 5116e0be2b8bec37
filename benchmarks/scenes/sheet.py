"""Pictures of the suite, and of what became of its clips."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from benchmarks.scenes.suite import EDITS, MOTIONS, Case, true_edit
from tokenflow.errors import InputError
from tokenflow.storage.atomic import atomic
from tokenflow.video import contact_sheet
from tokenflow.video.frames import levels

CELL, BETWEEN, GAP, LEFT, TOP = 48, 2, 10, 72, 16
WIDTH = 640
"""Pixels of a row's frames."""


def write_sheet(path: Path, suite: list[Case], frames: int = 16) -> None:
    """Of each clip three frames, above the source, below the true edit, as a WebP.

    Motions go downwards, edits to the right.
    """
    across, down = (n * (CELL + BETWEEN) - BETWEEN + GAP for n in (3, 2))
    size = LEFT + across * len(EDITS) - GAP, TOP + down * len(MOTIONS) - GAP
    sheet = Image.new("RGBA", size)
    draw = ImageDraw.Draw(sheet)
    for number, edit in enumerate(EDITS):
        draw.text((LEFT + number * across, 2), edit, "gray")
    for number, motion in enumerate(MOTIONS):
        draw.text((2, TOP + number * down), motion, "gray")
    for case in suite:
        place = LEFT + EDITS.index(case.edit) * across, TOP + MOTIONS.index(case.motion) * down
        pixels = levels(picture(case, frames)).permute(1, 2, 0).contiguous()
        sheet.paste(Image.fromarray(pixels.numpy()), place)
    with atomic(path) as temporary:
        sheet.save(temporary, format="WEBP", lossless=True)


def picture(case: Case, frames: int) -> Tensor:
    """First, middle and last frame of a clip, and the same of its true edit."""
    edit = case.of(frames)
    scenes = edit.scene, true_edit(edit)
    numbers = (0, frames // 2, frames - 1)
    rows = [torch.stack([scene.frame(i) for i in numbers]) for scene in scenes]
    return contact_sheet(rows, size=(CELL, CELL), gap=BETWEEN)


def write_rows(
    path: Path, suite: list[Case], rows: tuple[str, ...], folder: Path, frames: int
) -> None:
    """What rows made of each clip, below its source, as a WebP.

    Their pictures are the folder's; `frames` is how many these clips had.

    Raises:
        InputError: The folder has no picture of a clip's row.
    """
    strips = [strip for case in suite for strip in strips_of(case, rows, folder, frames)]
    down = strips[0][1].height + BETWEEN
    font = ImageFont.load_default(12)
    left = GAP + round(max(font.getlength(label) for label, _ in strips))
    sheet = Image.new("RGBA", (left + WIDTH, down * len(strips) - BETWEEN))
    draw = ImageDraw.Draw(sheet)
    for number, (label, strip) in enumerate(strips):
        sheet.paste(strip, (left, number * down))
        middle = number * down + strip.height // 2
        draw.text((2, middle), label, "gray", font=font, anchor="lm")
    with atomic(path) as temporary:
        sheet.save(temporary, format="WEBP", quality=80, method=6)


def strips_of(
    case: Case, rows: tuple[str, ...], folder: Path, frames: int
) -> Iterator[tuple[str, Image.Image]]:
    """Names and pictures, `WIDTH` pixels wide, of a clip's source and of its rows."""
    source = contact_sheet([case.of(frames).clip.frames])
    yield "source", narrow(Image.fromarray(levels(source).movedim(0, -1).contiguous().numpy()))
    for row in rows:
        file = folder / f"{case.seed} {row}.png"
        if not file.exists():
            raise InputError(f"there is no picture {file}; edit this clip first, without --sheet")
        yield row, narrow(Image.open(file).convert("RGB"))


def narrow(picture: Image.Image) -> Image.Image:
    """The picture scaled to `WIDTH`."""
    return picture.resize((WIDTH, round(picture.height * WIDTH / picture.width)))
