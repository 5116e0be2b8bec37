"""A picture of the suite: of each clip three frames, above the source, below the true edit."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from benchmarks.scenes.suite import EDITS, MOTIONS, Case, true_edit
from tokenflow.video import contact_sheet
from tokenflow.video.atomic import atomic
from tokenflow.video.frames import levels

CELL, BETWEEN, GAP, LEFT, TOP = 48, 2, 10, 72, 16


def write_sheet(path: Path, suite: list[Case], frames: int = 16) -> None:
    """Writes a PNG of 256 colours: motions downwards, edits to the right."""
    across, down = (n * (CELL + BETWEEN) - BETWEEN + GAP for n in (3, 2))
    size = LEFT + across * len(EDITS) - GAP, TOP + down * len(MOTIONS) - GAP
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for number, edit in enumerate(EDITS):
        draw.text((LEFT + number * across, 2), edit, "black")
    for number, motion in enumerate(MOTIONS):
        draw.text((2, TOP + number * down), motion, "black")
    for case in suite:
        place = LEFT + EDITS.index(case.edit) * across, TOP + MOTIONS.index(case.motion) * down
        pixels = levels(picture(case, frames)).permute(1, 2, 0).contiguous()
        sheet.paste(Image.fromarray(pixels.numpy()), place)
    with atomic(path) as temporary:
        sheet.quantize(256).save(temporary, format="PNG", optimize=True)


def picture(case: Case, frames: int) -> Tensor:
    """First, middle and last frame of a clip, and the same of its true edit."""
    edit = case.of(frames)
    scenes = edit.scene, true_edit(edit)
    numbers = (0, frames // 2, frames - 1)
    rows = [torch.stack([scene.frame(i) for i in numbers]) for scene in scenes]
    return contact_sheet(rows, size=(CELL, CELL), gap=BETWEEN)
