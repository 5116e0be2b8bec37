"""`tokenflow evaluate`: runs, or a video beside its source, in numbers."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers.utils.logging import disable_progress_bar

from tokenflow.cli.allowlist import restrict
from tokenflow.diffusion import Backbone
from tokenflow.engine.lightning.finished_run import FinishedRun
from tokenflow.engine.lightning.job import ClipSource
from tokenflow.engine.lightning.metrics import Sources, Values, measure_run, round_trip
from tokenflow.engine.progress import Reporter
from tokenflow.engine.region import white
from tokenflow.errors import InputError, explained
from tokenflow.metrics import Measures
from tokenflow.report.columns import column
from tokenflow.storage.atomic import atomic, require_room
from tokenflow.storage.paths import local
from tokenflow.text import printable
from tokenflow.video import read_clip

USAGE = """\
tokenflow evaluate RUN... [OPTIONS]
       tokenflow evaluate --source a.mp4 --edited b.mp4 [OPTIONS]"""
DESCRIPTION = """\
Measures runs of tokenflow predict, each against its own source, and writes metrics.json into their
folders; or any video against the one that it was made from, and writes --json. What each metric
means, and what it is blind to, is in docs/metrics.md."""


def parser() -> ArgumentParser:
    """What may follow `tokenflow evaluate`."""
    words = ArgumentParser(
        prog="tokenflow evaluate",
        usage=USAGE,
        description=DESCRIPTION,
        exit_on_error=False,
    )
    words.add_argument("runs", nargs="*", type=str, default=[], help="Folders of finished runs.")
    words.add_argument("--source", type=str | None, help="A video or folder of images, as it was.")
    words.add_argument("--edited", type=str | None, help="Its edit, frame by frame.")
    words.add_argument("--prompt", type=str, default="", help="What the edit shows; a run knows.")
    words.add_argument(
        "--source_prompt", type=str, default="", help="What the source shows; a run knows."
    )
    words.add_argument(
        "--mask",
        type=str | None,
        help="A video or folder of images, white where the object is that was to be edited.",
    )
    words.add_argument(
        "--round_trip",
        type=str | None,
        help="A model, as for --model.backbone: its VAE's round trip of each source is measured, "
        "too, which is the best that an edit with it can do.",
    )
    words.add_argument("--csv", type=str | None, help="A file for the table, in full.")
    words.add_argument(
        "--json",
        type=str | None,
        help="Of --source and --edited, a file for what metrics.json holds of a run.",
    )
    words.add_class_arguments(Measures, None)
    return words


def run(words: list[str]) -> None:
    """Runs the words after `tokenflow evaluate`.

    Raises:
        InputError: The words, a run or a video cannot be used.
    """
    restrict()
    try:
        options = parser().parse_args(words)
        given = vars(parser().instantiate(options))
    except ArgumentError as error:
        raise InputError(f"{error}\nsee tokenflow evaluate --help") from error
    runs, source, edited, prompt, source_prompt, mask, model, table, record = (
        given.pop(name)
        for name in (
            "runs", "source", "edited", "prompt", "source_prompt", "mask", "round_trip", "csv",
            "json",
        )
    )  # fmt: skip
    pair = [source, edited]
    if bool(runs) == any(pair) or (any(pair) and not all(pair)):
        raise InputError(
            "expected folders of runs, or --source and --edited; see tokenflow evaluate --help"
        )
    if runs and record is not None:
        raise InputError("--json is for --source and --edited; a run has its own metrics.json")
    if runs and (prompt or source_prompt):
        raise InputError(
            "--prompt and --source_prompt are for --source and --edited; a run has its own"
        )
    for file, option in ((table, "--csv"), (record, "--json")):
        if file is not None:
            with refused(file, option):  # before all is measured for nothing
                require_room(local(file).parent)
    disable_progress_bar()
    measures = Measures(**given)
    backbone = None if model is None else Backbone.load(model)
    failed: list[str] = []
    if runs:
        rows, failed = of_runs(runs, Sources(measures, backbone, mask))
    else:
        found = of_pair(source, edited, measures, backbone, (prompt, source_prompt), mask)
        floor = found["round_trip"]
        rows = {} if floor is None else {f"VAE round trip of {source}": floor}
        rows[edited] = found["metrics"]
    if rows:
        show(rows)
    if record is not None:
        write_json(record, found)
    if rows and table is not None:
        write_csv(table, rows)
    if failed:
        raise InputError("\n".join(failed))


def of_runs(runs: Sequence[str], sources: Sources) -> tuple[dict[str, Values], list[str]]:
    """A row for each run, after its source's round trip if that is new; and why others failed."""
    rows: dict[str, Values] = {}
    failed: list[str] = []
    reporter = Reporter()
    with reporter.bars:
        for number, folder in enumerate(map(local, runs), start=1):
            reporter.item("measuring", str(folder), number, len(runs))
            try:
                one = FinishedRun.read(folder)
                found = measure_run(one, sources)
            except Exception as error:  # whatever is wrong with one record, others are measured
                failed.append(f"{folder} is not measured: {explained(error)}")
                continue
            name, floor = f"VAE round trip of {one.source.path}", found["round_trip"]
            # one source has several where its frames, their size or the prompt are others
            if floor is not None and rows.setdefault(name, floor) != floor:
                rows[f"{name}, as in {folder}"] = floor
            way = one.record.get("consistency", "tokenflow")
            also = {"none": " (per frame)", "joint": " (joint)"}.get(way, "")
            rows[f"{folder}{also}"] = found["metrics"]
        reporter.complete("measuring")
    return rows, failed


def of_pair(
    source: str,
    edited: str,
    measures: Measures,
    backbone: Backbone | None,
    prompts: tuple[str, str],
    mask: str | None,
) -> dict[str, Any]:
    """An edit measured, in the form of `metrics.json`."""
    old, new = (read_clip(path, in_memory=False) for path in map(local, (source, edited)))
    hidden = None if mask is None else white(read_clip(local(mask), in_memory=False).frames)
    if hidden is not None and len(hidden) == 1:  # one image, of all frames
        hidden = hidden.expand(len(old), -1, -1)
    motions, floor = measures.motions(old), None
    measures.check(new, old, hidden)
    reporter = Reporter()
    with reporter.bars:
        reporter.item("measuring", edited, 1, 1)
        if backbone is not None:
            back = round_trip(backbone, ClipSource(local(source)), like=old)
            floor = measures.of(back, motions, prompts[1], prompts[1], hidden)
        found = measures.of(new, motions, *prompts, hidden)
        reporter.complete("measuring")
    return {
        "metrics": found,
        "round_trip": floor,
        "source": source,
        "edited": edited,
        "frames": len(new),
        "size": list(new.frames.shape[-2:]),
        "options": measures.described
        | {"mask": mask, "prompt": prompts[0], "source_prompt": prompts[1]},
        "tokenflow": version("tokenflow"),
    }


def show(rows: Mapping[str, Values]) -> None:
    """Prints the table; ↑ is better when higher, ↓ when lower, flicker when near the source's."""
    table = Table()
    table.add_column("", overflow="fold")
    names = [name for name in every_name(rows) if column(name)]
    shown = [(name, c) for name in names if (c := column(name))]
    for _, c in shown:
        table.add_column(f"{c.heading}\n{c.unit}", justify="right")
    for row, values in rows.items():
        cells = [c.text(values.get(name)) for name, c in shown]
        table.add_row(Text(printable(row)), *cells)  # no markup: a folder may be named a[/b]
    console = Console()
    # a file or pipe has no width; whoever reads it wants the table whole
    (console if console.is_terminal else Console(width=200)).print(table)


def every_name(rows: Mapping[str, Values]) -> list[str]:
    """The metrics that any row has, in their order."""
    return list(dict.fromkeys(name for values in rows.values() for name in values))


def write_csv(file: str, rows: Mapping[str, Values]) -> None:
    """A line for each row, with every metric as it is in `metrics.json`."""
    with (
        writing(file, "--csv") as temporary,
        # names that are no UTF-8 stay as they are
        temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as opened,
    ):
        writer: Any = csv.DictWriter(opened, ["video", *every_name(rows)])
        writer.writeheader()
        writer.writerows({"video": video, **values} for video, values in rows.items())


def write_json(file: str, found: Mapping[str, Any]) -> None:
    """What was measured, laid out as `metrics.json` is."""
    with writing(file, "--json") as temporary:
        temporary.write_text(json.dumps(found, indent=2, allow_nan=False) + "\n")


@contextmanager
def writing(file: str, option: str) -> Iterator[Path]:
    """A temporary path that becomes an option's file; `InputError` if it cannot be written."""
    with refused(file, option), atomic(local(file)) as temporary:
        yield temporary


@contextmanager
def refused(file: str, option: str) -> Iterator[None]:
    """A block whose disk errors become an `InputError`."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{file} cannot be written: {error}; choose another {option}") from error
