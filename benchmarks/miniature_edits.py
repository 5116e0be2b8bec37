"""Edits of moving scenes by every way of consistency, judged, with exact flow.

    python benchmarks/miniature_edits.py --steps 25

prints the table of docs/miniature.md and leaves a contact sheet for each edit.
"""

from __future__ import annotations

from pathlib import Path
from time import perf_counter

import torch
from rich.console import Console
from rich.table import Table

from tokenflow.diffusion import Backbone, invert
from tokenflow.editors import PnP
from tokenflow.engine import Settings, edit_latents
from tokenflow.miniature.edits import EDITOR, SceneEdit, judge_edit, suite
from tokenflow.miniature.judge import Judge
from tokenflow.propagation import NNField
from tokenflow.video import contact_sheet, write_image

ROWS: dict[str, dict[str, str]] = {
    "per-frame PnP": {"consistency": "none"},
    "joint attention only": {"consistency": "joint"},
    "TokenFlow, published code's neighbours": {"neighbours": "previous"},
    "TokenFlow": {},
    "TokenFlow, linear blend": {"blend": "linear"},
}


def main(
    folder: Path = Path("runs/miniature_edits"),
    steps: int = 25,
    guidance: float = 4.0,
    attention: float = EDITOR.attention,
    features: float = EDITOR.features,
    feature_layers: int = EDITOR.feature_layers,
    frames: int = 24,
    keyframe_every: int = 8,
    rows: tuple[str, ...] = tuple(ROWS),
    clips: tuple[int, ...] = (0, 1, 2, 3),
) -> None:
    """Edits each clip in each way and prints a table of means.

    Args:
        folder: Where contact sheets go.
        steps: Sampling and inversion steps.
        guidance: Scale of classifier-free guidance.
        attention: PnP's threshold for queries and keys.
        features: PnP's threshold for features.
        feature_layers: How many decoder layers take them.
        frames: Frames of a clip.
        keyframe_every: Frames in a window.
        rows: Which ways to compare.
        clips: Which of the four edits.
    """
    backbone, judge, console = Backbone.load("miniature"), Judge.load(), Console()
    schedule, editor = backbone.schedule(steps), PnP(attention, features, feature_layers)
    results: dict[str, list[tuple[float, float, float, float]]] = {}
    for number in clips:
        edit = suite(frames)[number]
        latents = torch.cat([backbone.encode(x) for x in edit.clip.frames.split(8)])
        shown = [edit.clip.frames, decoded(backbone, latents)]
        record(results, "VAE round trip of the source", edit, shown[-1], judge, 0.0)
        source = str(edit.scene.attributes)
        trajectory = invert(backbone, latents, source, schedule, steps)
        for row in rows:
            settings = Settings(
                steps=steps, guidance=guidance, keyframe_every=keyframe_every, **ROWS[row]
            )
            begin = perf_counter()
            edited = edit_latents(
                backbone, trajectory, schedule, editor, NNField(),
                str(edit.target), inversion_prompt=source, settings=settings,
            )  # fmt: skip
            seconds = perf_counter() - begin
            shown.append(decoded(backbone, edited))
            record(results, row, edit, shown[-1], judge, seconds)
            console.print(number, row, *(f"{x:.3g}" for x in results[row][-1]))
        write_image(folder / f"{edit.clip.name}.png", contact_sheet(shown))

    table = Table(title=f"{len(clips)} clips of {frames} frames, {steps} steps")
    for column in ("", "edited", "kept", "warp error ×10⁻³", "above round trip", "s/frame"):
        table.add_column(column, justify="left" if not column else "right")
    floor = mean(results["VAE round trip of the source"], 2)
    for name, values in results.items():
        error = mean(values, 2)
        table.add_row(
            name, f"{mean(values, 0):.1%}", f"{mean(values, 1):.1%}", f"{1e3 * error:.2f}",
            f"{1e3 * (error - floor):.2f}", f"{mean(values, 3) / frames:.2f}",
        )  # fmt: skip
    console.print(table)


def decoded(backbone: Backbone, latents: torch.Tensor) -> torch.Tensor:
    return torch.cat([backbone.decode(x).cpu() for x in latents.split(8)])


def record(
    results: dict[str, list[tuple[float, float, float, float]]],
    row: str,
    edit: SceneEdit,
    frames: torch.Tensor,
    judge: Judge,
    seconds: float,
) -> None:
    verdict = judge_edit(edit, frames, judge)
    values = (verdict.edited, verdict.kept, verdict.warp_error, seconds)
    results.setdefault(row, []).append(values)


def mean(values: list[tuple[float, float, float, float]], column: int) -> float:
    return sum(v[column] for v in values) / len(values)


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main, as_positional=False)
