"""The benchmark with ground truth: `python -m benchmarks.scenes`, from the project's root.

Edits every clip of the suite in every way, and prints means over clips. What is measured is kept
in the folder: started again, it goes on where it stopped. docs/benchmark.md has the metrics.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from jsonargparse import auto_cli
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from benchmarks.scenes.measure import Truth
from benchmarks.scenes.results import Record, Results, commit
from benchmarks.scenes.rows import (
    CHOSEN_AMONG,
    EDITED_BY,
    EFFORT,
    FLOOR,
    KNOWN,
    REFERENCE,
    ROWS,
    SOURCE,
    TRUTH,
    Plan,
    Workbench,
)
from benchmarks.scenes.sheet import write_rows, write_sheet
from benchmarks.scenes.suite import FILE, Case, cases
from benchmarks.scenes.tables import complete, page_of, tables
from tokenflow.errors import InputError
from tokenflow.miniature.judge import Judge
from tokenflow.storage.atomic import atomic
from tokenflow.video import contact_sheet, write_image

QUICK = Plan(frames=4, steps=2, reference_inversion=2, keyframe_every=2)
QUICK_ROWS = (TRUTH, FLOOR, "per-frame PnP", "TokenFlow")
PARTS = {"measured": ROWS, "choices": CHOSEN_AMONG, "editors": EDITED_BY}
SOME = (0, 6, 12, 18, 24, 25, 31)
"""A clip of each kind of motion, in which every kind of edit is."""


def main(
    folder: Path = Path("runs/scenes"),
    plan: Plan = Plan(),  # noqa: B008 (it is frozen)
    part: Literal["measured", "choices", "editors"] = "measured",
    rows: tuple[str, ...] = (),
    clips: tuple[int, ...] = (),
    suite: Path = FILE,
    quick: bool = False,
    page: Path | None = None,
    sheet: Path | None = None,
) -> None:
    """Measures what is not measured yet, prints the tables, and writes them to a page.

    Args:
        folder: Where results.jsonl, tables.md and pictures of all edits go.
        plan: What all rows have in common.
        part: Which table: methods on all clips, or settings of TokenFlow, or editors without
            inversion, few-step models and a transformer, both on one clip of each motion.
        rows: Only some rows.
        clips: Only some clips, numbers from 0 in the suite.
        suite: Clips to edit: `suite.csv`, or `more.csv` with other seeds.
        quick: Two clips of 4 frames, 4 rows and 2 steps instead, to see that it works.
        page: A Markdown page that gets the tables, between its two marks for them.
        sheet: Only write a picture to this WebP: of the suite's clips and their true edits, or, if
            clips are given, of what the rows made of these, from the folder's pictures.
    """
    known = (TRUTH, FLOOR, SOURCE, *KNOWN)
    if unknown := [row for row in rows if row not in known]:
        raise InputError(f"expected rows from {', '.join(known)}, got {', '.join(unknown)}")
    if page is not None and not page.exists():
        raise InputError(f"the page {page} does not exist; the tables are also in {folder}")
    if page is not None:
        page_of(page.read_text(), part, "")  # raises now rather than when all is measured
    if quick:
        plan, rows, clips = QUICK, QUICK_ROWS, (0, 22)
    elif part != "measured":
        clips = clips or SOME
    rows = rows or PARTS[part]
    every = cases(suite)
    chosen = [every[i] for i in clips] if clips else every
    if sheet is not None:
        if clips:
            write_rows(sheet, chosen, rows, folder, plan.frames)
        else:
            write_sheet(sheet, chosen)
        return
    results, console = Results(folder / "results.jsonl", commit()), Console(width=160)
    measure(results, chosen, rows, plan, folder, console)
    seeds = {case.seed for case in chosen}
    records = [r for r in results.records(plan) if r["case"]["seed"] in seeds]
    text = write_up(complete(records, rows), rows, plan, console)
    write(folder / "tables.md", text + "\n")
    if page is not None:
        write(page, page_of(page.read_text(), part, text))


def measure(
    results: Results,
    chosen: list[Case],
    rows: tuple[str, ...],
    plan: Plan,
    folder: Path,
    console: Console,
) -> None:
    """Adds the records that are missing, clip by clip."""
    work = [(case, results.missing(case, rows, plan)) for case in chosen]
    total = sum(EFFORT.get(row, 1.0) for _, missing in work for row in missing)
    if not total:
        return
    judge = Judge.load()
    columns = BarColumn(), TaskProgressColumn(), TextColumn("left"), TimeRemainingColumn()
    with Progress(*columns, console=console, speed_estimate_period=3600) as progress:
        task = progress.add_task("", total=total)
        for case, missing in work:
            if not missing:
                continue
            truth = Truth(case.of(plan.frames))
            bench = Workbench(truth, plan)
            for row in missing:
                frames, cost = bench.make(row)
                found = truth.measure(frames, judge)
                record = {"seconds": cost.seconds, "evaluations": cost.evaluations, **found}
                results.add(case, row, plan, record)
                write_image(folder / f"{case.seed} {row}.png", contact_sheet([frames]))
                progress.advance(task, EFFORT.get(row, 1.0))
                left = progress.tasks[task].time_remaining
                progress.console.print(
                    f"{case.motion}, {case.edit}, {row}: edited {found['edited']:.0%}, kept "
                    f"{found['kept']:.0%}, {cost.seconds:.0f} s"
                    + (f"; {left / 60:.0f} min left" if left is not None else "")
                )


def write_up(records: list[Record], rows: tuple[str, ...], plan: Plan, console: Console) -> str:
    """Prints the tables; returns them as Markdown, with their provenance, the long ones folded."""
    seeds = sorted({r["case"]["seed"] for r in records})
    if not seeds:
        return "No clip has all rows yet."
    commits = ", ".join(sorted({r["commit"] for r in records}))
    about = (
        f"{len(seeds)} clips of {plan.frames} frames, {plan.steps} "
        f"steps ({plan.reference_inversion} of inversion in “{REFERENCE}”), guidance "
        f"{plan.guidance:g}, windows of {plan.keyframe_every}, unless a row has its own. "
        f"Commit {commits}; seeds {', '.join(map(str, seeds))}."
    )
    found = tables(records, rows)
    console.print(about, *(table.rich() for table in found))
    every, *parts = (table.markdown() for table in found)
    fold = "<details markdown>\n<summary>By motion and by edit</summary>"
    return "\n\n".join([every, about, fold, *parts, "</details>"])


def write(file: Path, text: str) -> None:
    with atomic(file) as temporary:
        temporary.write_text(text)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
