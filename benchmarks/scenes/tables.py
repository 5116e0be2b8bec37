"""Tables of means over clips, on the terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import mean

from rich.table import Table

from benchmarks.scenes.measure import DISTANCES
from benchmarks.scenes.results import Record
from benchmarks.scenes.rows import FLOOR
from benchmarks.scenes.suite import EDITS, MOTIONS
from tokenflow.errors import InputError


@dataclass(frozen=True)
class Text:
    """A table's title and its lines, of which the first are the columns' names."""

    title: str
    lines: list[list[str]]

    def rich(self) -> Table:
        table = Table(title=self.title)
        for number, name in enumerate(self.lines[0]):
            table.add_column(name, justify="right" if number else "left")
        for line in self.lines[1:]:
            table.add_row(*line)
        return table

    def markdown(self) -> str:
        rule = ["---", *["--:"] * (len(self.lines[0]) - 1)]
        lines = [f"| {' | '.join(line)} |" for line in (self.lines[0], rule, *self.lines[1:])]
        return "\n".join([f"**{self.title}**", "", *lines])


def tables(records: list[Record], rows: tuple[str, ...]) -> list[Text]:
    """The table of all clips, and those by kind of motion and of edit."""
    columns = {
        "warp error ×10⁻³": lambda r: number(average(r, "warp_error_1"), 1e3),
        "above round trip": lambda r: number(above(r, records), 1e3),
        **{
            f"{d} frames apart": lambda r, name=f"warp_error_{d}": number(average(r, name), 1e3)
            for d in DISTANCES[1:]
            if average(records, f"warp_error_{d}") is not None
        },
        "edited": lambda r: share(average(r, "edited")),
        "kept": lambda r: share(average(r, "kept")),
        "PSNR inside, dB": lambda r: number(average(r, "psnr_inside"), 1, 1),
        "outside": lambda r: number(average(r, "psnr_outside"), 1, 1),
        "whole": lambda r: number(average(r, "psnr"), 1, 1),
        "sharpness": lambda r: number(average(r, "sharpness"), 1),
        "s/frame": lambda r: number(per_frame(r, "seconds"), 1),
        "evaluations/frame": lambda r: number(per_frame(r, "evaluations"), 1, 1),
    }
    by_row = {row: [r for r in records if r["row"] == row] for row in rows}
    every = [[row, *(show(of) for show in columns.values())] for row, of in by_row.items()]
    found = [Text("All clips", [["", *columns], *every])]
    for kind, values in (("motion", MOTIONS), ("edit", EDITS)):
        there = [v for v in values if any(r["case"][kind] == v for r in records)]
        lines = [
            [row, *(cell([r for r in of if r["case"][kind] == v]) for v in there)]
            for row, of in by_row.items()
        ]
        title = f"By {kind}: edited, kept, PSNR inside (dB), warp error (×10⁻³)"
        found.append(Text(title, [["", *there], *lines]))
    return found


def complete(records: list[Record], rows: tuple[str, ...]) -> list[Record]:
    """Those of clips that have all rows: means over different clips do not compare."""
    seeds = [{r["case"]["seed"] for r in records if r["row"] == row} for row in rows]
    whole = set.intersection(*seeds)
    return [r for r in records if r["case"]["seed"] in whole and r["row"] in rows]


def average(records: Iterable[Record], name: str) -> float | None:
    """The mean over clips of a metric, where it applies."""
    values = [r[name] for r in records if r.get(name) is not None]
    return mean(values) if values else None


def above(records: list[Record], every: list[Record]) -> float | None:
    """The warp error above that of the true edit's round trip."""
    error = average(records, "warp_error_1")
    floor = average((r for r in every if r["row"] == FLOOR), "warp_error_1")
    return None if error is None or floor is None else error - floor


def per_frame(records: list[Record], name: str) -> float:
    return mean(r[name] / r["plan"]["frames"] for r in records)


def cell(records: list[Record]) -> str:
    return " · ".join(
        [
            share(average(records, "edited")),
            share(average(records, "kept")),
            number(average(records, "psnr_inside"), 1, 1),
            number(average(records, "warp_error_1"), 1e3),
        ]
    )


def number(value: float | None, scale: float, digits: int = 2) -> str:
    return "–" if value is None else f"{scale * value:.{digits}f}"


def share(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def page_of(text: str, part: str, measured: str) -> str:
    """A page with what was measured between a part's two marks.

    Raises:
        InputError: The page has no such marks.
    """
    begin, end = (f"<!-- {part}: {word} -->" for word in ("begin", "end"))
    before, first, rest = text.partition(begin)
    _, last, after = rest.partition(end)
    if not (first and last):
        raise InputError(f"expected a page with {begin} and {end}, which this one has not")
    return f"{before}{begin}\n\n{measured}\n\n{end}{after}"
