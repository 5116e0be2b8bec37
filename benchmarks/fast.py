"""The fast mode against the default, end to end, and each of its choices alone.

    python -m benchmarks.fast

edits clips of the benchmark with ground truth in every way, from source frames to edited ones, and
prints the table of docs/fast.md. What is measured is kept in the folder, with a picture of each
edit: started again, it goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import yaml
from rich.console import Console

from benchmarks.kept_matches import KeptMatches
from benchmarks.scenes.measure import Truth
from benchmarks.scenes.results import Record, Results, commit
from benchmarks.scenes.rows import FLOOR, Plan, counted
from benchmarks.scenes.sheet import write_rows
from benchmarks.scenes.suite import cases
from benchmarks.scenes.tables import Text, number, share
from tokenflow.diffusion import Backbone
from tokenflow.engine import Settings, edit_clip
from tokenflow.miniature.edits import EDITOR
from tokenflow.miniature.judge import Judge
from tokenflow.propagation import NNField
from tokenflow.video import contact_sheet, write_image

DEFAULT, FAST = "default", "fast"
PRESET = yaml.safe_load((Path(__file__).parents[1] / "configs" / "fast.yaml").read_text())["model"]
UNRECORDED = {"steps": 15, "inversion_solver": "uni-inv", "guidance_end": 0.8}
RECORDED = UNRECORDED | {"record_source": True}
ROWS: dict[str, dict[str, Any]] = {
    DEFAULT: {},
    FAST: PRESET,
    "recorded in inversion": {"record_source": True},
    "15 steps": {"steps": 15},
    "15 steps, guidance to 0.8": {"steps": 15, "guidance_end": 0.8},
    "15 steps, guidance to 0.8, recorded": {
        "steps": 15, "guidance_end": 0.8, "record_source": True,
    },
    "15 steps, Uni-Inv": {"steps": 15, "inversion_solver": "uni-inv"},
    "15 steps, Uni-Inv, guidance to 0.8": UNRECORDED,
    "15 steps, Uni-Inv, guidance to 0.8, recorded": RECORDED,
    "18 steps, Uni-Inv, guidance to 0.8": UNRECORDED | {"steps": 18},
    "15 steps, Uni-Inv, guidance to 0.5": UNRECORDED | {"guidance_end": 0.5},
    "12 steps, Uni-Inv": {"steps": 12, "inversion_solver": "uni-inv"},
    "12 steps, guidance to 0.8": {"steps": 12, "guidance_end": 0.8},
    "12 steps, Uni-Inv, guidance to 0.8": UNRECORDED | {"steps": 12},
    "matches shared by sites": {},
    "fixed keyframes": {"keyframes": "center"},
    "fixed keyframes, matches of every third step": {"keyframes": "center"},
    "fast, matches shared by sites": PRESET,
    "fast, fixed keyframes": PRESET | {"keyframes": "center"},
    "fast, fixed keyframes, matches of every third step": PRESET | {"keyframes": "center"},
    "fast, fixed keyframes, both": PRESET | {"keyframes": "center"},
}  # fmt: skip
"""Where settings are not the default."""
KERNELS: dict[str, Callable[[], NNField]] = {
    "matches shared by sites": partial(KeptMatches, shared=True),
    "fixed keyframes, matches of every third step": partial(KeptMatches, every=3),
    "fast, matches shared by sites": partial(KeptMatches, shared=True),
    "fast, fixed keyframes, matches of every third step": partial(KeptMatches, every=3),
    "fast, fixed keyframes, both": partial(KeptMatches, every=3, shared=True),
}
"""Where the kernel is not the default."""
PLAN = Plan(frames=8, steps=50, reference_inversion=50, keyframe_every=4)


def main(
    folder: Path = Path("runs/fast"),
    plan: Plan = PLAN,
    rows: tuple[str, ...] = (DEFAULT, FAST),
    clips: tuple[int, ...] = (),
    fusion: float | None = None,
    sheet: Path | None = None,
) -> None:
    """Measures what is not measured yet, and prints the table.

    Args:
        folder: Where results.jsonl and pictures of all edits go.
        plan: What all rows have in common, and the default's steps.
        rows: Which rows; all are compared with the default.
        clips: Only some clips, numbers from 0 in the benchmark's suite.
        fusion: Of all rows; take a folder for each value.
        sheet: Only write a picture to this WebP: of these clips by these rows, from the folder's
            pictures.
    """
    results, suite = Results(folder / "results.jsonl", commit()), cases()
    chosen = [suite[i] for i in clips] if clips else suite
    if sheet is not None:
        write_rows(sheet, chosen, rows, folder, plan.frames)
        return
    backbone, judge, console = Backbone.load("miniature", "cpu"), Judge.load(), Console(width=120)
    for case in chosen:
        missing = results.missing(case, (FLOOR, *rows), plan)
        truth = Truth(case.of(plan.frames)) if missing else None
        for row in missing:
            assert truth is not None
            if row == FLOOR:
                with counted(backbone.network) as cost:
                    frames = backbone.decode(backbone.encode(truth.frames)).cpu()
            else:
                options = {"steps": plan.steps, **ROWS[row]}
                settings = Settings(
                    guidance=plan.guidance, keyframe_every=plan.keyframe_every, fusion=fusion,
                    **options,
                )  # fmt: skip
                prompts = truth.edit.prompts
                with counted(backbone.network) as cost:
                    frames = edit_clip(
                        backbone, truth.source, prompts, EDITOR, KERNELS.get(row, NNField)(),
                        settings,
                    ).clip.frames[:]  # fmt: skip
            measured = {**vars(cost), **truth.measure(frames, judge)}
            results.add(case, row, plan, measured)
            write_image(folder / f"{case.seed} {row}.png", contact_sheet([frames]))
            console.print(case.motion, case.edit, row, f"{cost.seconds:.1f} s", measured)
    seeds = {case.seed for case in chosen}
    records = [r for r in results.records(plan) if r["case"]["seed"] in seeds]
    found = table(records, rows, plan)
    console.print(found.rich())
    print(found.markdown())


def table(records: list[Record], rows: tuple[str, ...], plan: Plan) -> Text:
    """One line for each row, over the clips that it shares with the default.

    In brackets the least and the largest ratio of times, and the default's shares.
    """
    by_row = {
        row: {r["case"]["seed"]: r for r in records if r["row"] == row} for row in (FLOOR, *rows)
    }
    columns = (
        "", "clips", "time", "evaluations", "error", "warp error ×10⁻³", "edited", "kept",
        "PSNR, dB",
    )  # fmt: skip
    lines = [list(columns)]
    for row in rows:
        seeds = by_row[row].keys() & by_row[DEFAULT].keys() & by_row[FLOOR].keys()
        if not seeds:
            continue
        of, default, floor = (
            [by_row[name][seed] for seed in sorted(seeds)] for name in (row, DEFAULT, FLOOR)
        )
        times = [d["seconds"] / r["seconds"] for r, d in zip(of, default, strict=True)]
        calls = mean(d["evaluations"] / r["evaluations"] for r, d in zip(of, default, strict=True))
        error, others, least = (mean(r["warp_error_1"] for r in x) for x in (of, default, floor))
        lines.append(
            [
                row, f"{len(seeds)}", f"{median(times):.2f} ({min(times):.2f} to {max(times):.2f})",
                f"{calls:.2f}", f"{(error - least) / (others - least):.2f}", number(error, 1e3),
                *(
                    f"{share(mean(r[name] for r in of))} ({share(mean(r[name] for r in default))})"
                    for name in ("edited", "kept")
                ),
                number(mean(r["psnr"] for r in of), 1, 1),
            ]
        )  # fmt: skip
    about = f"{plan.frames} frames, {plan.steps} steps, windows of {plan.keyframe_every}"
    return Text(
        f"Times faster than the default, error above round trip relative to it; {about}", lines
    )


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main, as_positional=False)
