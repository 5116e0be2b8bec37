"""How well automatic masks find what an edit is to change, and how they keep the rest.

    python -m benchmarks.automatic_mask

prints the table of docs/choosing.md, of eight clips of `scenes/suite.csv`: scenes tell where an
object is. The clips, masks and edits are left in a folder as sheets.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.scenes.suite import Case, cases, true_edit
from tokenflow.diffusion import Backbone
from tokenflow.engine import Settings, edit_clip
from tokenflow.engine.region import AUTO, white
from tokenflow.metrics import decibels
from tokenflow.miniature.edits import EDITOR
from tokenflow.miniature.judge import Judge, accuracy
from tokenflow.propagation import NNField
from tokenflow.video import contact_sheet, write_image

COLUMNS = "motion", "edit", "true", "white", "IoU", "covered", "edited", "masked", "PSNR", "masked"


def main(
    motions: tuple[str, ...] = ("translation", "leaving"),
    edits: tuple[str, ...] = ("colour", "pattern", "background", "shape"),
    frames: int = 8,
    steps: int = 15,
    folder: Path = Path("runs/automatic_mask"),
) -> None:
    """Edits each clip without and with an automatic mask, and prints a row."""
    model, judge, table, rows = Backbone.load("miniature"), Judge.load(), Table(*COLUMNS), []
    for case in (one for one in cases() if one.motion in motions and one.edit in edits):
        rows.append(list(measured(case, frames, model, judge, steps, folder)))
        table.add_row(case.motion, case.edit, *(f"{value:.2f}" for value in rows[-1]))
        print(case.motion, case.edit, *rows[-1], flush=True)
    means = torch.tensor(rows).mean(dim=0).tolist()
    table.add_row("mean", "", *(f"{value:.2f}" for value in means))
    Console(width=100).print(table)


def measured(
    case: Case, frames: int, model: Backbone, judge: Judge, steps: int, folder: Path
) -> Iterator[float]:
    """The numbers of a clip's row."""
    edit, settings = case.of(frames), Settings(steps=steps, keyframe_every=4, fusion=0.0)
    clip, true = edit.clip, true_edit(edit)
    plain, local = (
        edit_clip(model, clip, edit.prompts, EDITOR, NNField(), settings, mask=mask)
        for mask in (None, AUTO)
    )
    assert local.mask is not None, "an automatic one"
    found, results = local.mask.frames[:], [one.clip.frames.clamp(0, 1) for one in (plain, local)]
    sheet = contact_sheet([clip.frames, found, true.render(), *results])
    write_image(folder / f"{case.motion}-{case.edit}.png", sheet)
    masks = [scene.mask(i) for scene in (edit.scene, true) for i in range(frames)]
    cover = torch.stack(masks).unflatten(0, (2, frames)).amax(dim=0)  # of source and true edit
    region, elsewhere = cover > 0.5, cover < 0.02
    if "background" in edit.changed:
        region, elsewhere = ~region, cover > 0.98
    mask = white(found)
    yield from (one.float().mean().item() for one in (region, mask))
    both = (mask & region).float()
    yield from (both[of].mean().item() for of in (mask | region, region))  # IoU, and covered
    for result in results:
        yield accuracy(judge, result, edit.target)[edit.changed[0]]
    for result in results:
        yield decibels(float((result - clip.frames).square().mean(dim=1)[elsewhere].mean()))


if __name__ == "__main__":
    main()
