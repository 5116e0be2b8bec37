"""Pages from templates: one run's, and several runs' side by side."""

from __future__ import annotations

import hashlib
import math
import os
from base64 import b64encode
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tokenflow.errors import InputError
from tokenflow.report.columns import best, column
from tokenflow.report.features import Features
from tokenflow.report.pictures import (
    SPACE,
    Curve,
    Plot,
    Space,
    distance,
    picture,
    slice_rows,
    slices,
    warp_errors,
)
from tokenflow.runs.files import EDITED, FEATURES, REPORT
from tokenflow.runs.record import Run, require_alike
from tokenflow.storage.atomic import atomic
from tokenflow.text import printable_lines
from tokenflow.video import contact_sheet

SQUARED = "mean of squared difference × 1000, along the source's flow"
ABSOLUTE = "mean of |difference|, of 255 levels"
MAIN = (
    "editor", "propagation", "consistency", "backbone", "steps", "inversion_steps",
    "inversion_solver", "guidance", "guidance_begin", "guidance_end", "keyframe_every",
    "keyframes", "neighbours", "blend", "fusion", "fusion_end", "seed",
    "negative_prompt", "dtype", "device",
)  # fmt: skip
"""The settings that a run's page shows before all others."""


def write_report(run: Run, output: Path | None = None, features: Features | None = None) -> Path:
    """Writes one run's page, into its folder by default.

    Its features are those that the run has left, where no others are given.

    Raises:
        InputError: One of the run's files cannot be read.
    """
    source, edited = run.source(), run.edited()
    require_alike(source, edited, run)
    kept = run.place / FEATURES
    if features is None and kept.exists():
        features = Features.load(kept)
    rows, space = slice_rows(source.frames.shape[2]), Space(SPACE)
    video = space.file(run.place / EDITED, sound=run.sound)
    errors = zip(("source", "edit"), warp_errors(source.frames, edited.frames), strict=True)
    along = [Curve(name, name, values) for name, values in errors]
    apart = [Curve("edit − source", "edit", distance(source.frames, edited.frames))]
    return write_page(
        "run.html",
        output or run.place / REPORT,
        title=run.settings.get("prompt") or run.name,
        run=run,
        # a long clip's edit is too big, and its source not worth the time of writing it
        videos={"source": space.source(source) if video.uri else video, "edit": video},
        slices={
            "source": picture(slices(source.frames, rows)),
            "edit": picture(slices(edited.frames, rows)),
        },
        rows=[row / source.frames.shape[2] for row in rows],
        height=source.frames.shape[2],
        width=source.frames.shape[3],
        rate=float(source.rate),
        times=[float(time) for time in source.times],
        sheet=picture(contact_sheet([source.frames, edited.frames])),
        plots=[
            Plot("Warp error", "what changes without moving", SQUARED, along),
            Plot("From source to edit", "how much of each frame is new", ABSOLUTE, apart),
        ],
        features=features,
        main=[(name, run.settings[name]) for name in MAIN if name in run.settings],
        configuration=yaml.safe_dump(run.record, sort_keys=False, allow_unicode=True),
    )


def write_comparison(runs: Sequence[Run], output: Path) -> Path:
    """Writes the page of several runs: their videos, metrics, and the settings that differ.

    Raises:
        InputError: A run's files cannot be read.
    """
    names, prompts = names_of(runs), {str(run.settings.get("prompt") or "") for run in runs}
    space = Space(SPACE)
    named = list(zip(names, runs, strict=True))
    tiles = [(name, space.file(run.folder / EDITED, sound=run.sound)) for name, run in named]
    sources = {str(source_of(run)): (name, run) for name, run in reversed(named)}
    clips = [(name, space.source(run.source())) for name, run in reversed(sources.values())]
    metrics = unite([run.metrics for run in runs])
    settings = {name: row for name, row in unite([r.settings for r in runs]).items() if differ(row)}
    seconds = [round(sum(run.seconds.values()), 1) or None for run in runs]
    main = {name: settings.pop(name) for name in MAIN if name in settings}
    columns = [*main.items(), *settings.items(), *metrics.items(), ("seconds", seconds)]
    cells = zip(
        *(
            measured(name, values, metrics) if name in metrics else list(map(Cell.of, values))
            for name, values in columns
        ),
        strict=True,
    )
    return write_page(
        "comparison.html",
        output,
        title=(prompts.pop() if len(prompts) == 1 else None) or ", ".join(names),
        sources=[("source" if len(clips) == 1 else f"source of {n}", v) for n, v in clips],
        tiles=tiles,
        columns=[title(name) if name in metrics else name for name, _ in columns],
        table=list(zip(names, cells, strict=True)),
        floors=floors(named, [name for name, _ in columns]),
    )


class Cell(NamedTuple):
    """What stands in a cell of the table, the number that it is sorted by, whether it is best."""

    text: str
    number: float | int | None = None
    best: bool = False

    @classmethod
    def of(cls, value: Any) -> Cell:
        """A setting's value, or the seconds."""
        known = isinstance(value, int | float) and not isinstance(value, bool) and value == value
        return cls(number(value), value if known else None)


def measured(
    name: str, values: Sequence[float | None], metrics: Mapping[str, Sequence[Any]]
) -> list[Cell]:
    """A metric's cells, in the unit of the table that `tokenflow evaluate` prints."""
    shown = column(name)
    if shown is None:
        return list(map(Cell.of, values))
    first = best(name, values, metrics)
    return [
        Cell(shown.text(v), Cell.of(v).number, place in first) for place, v in enumerate(values)
    ]


def title(name: str) -> str:
    """A metric's heading and unit, as in the table that `tokenflow evaluate` prints."""
    shown = column(name)
    return name if shown is None else f"{shown.heading}, {shown.unit}"


def names_of(runs: Sequence[Run]) -> list[str]:
    """The folders' names; where two have the same, as much of their paths as tells them apart."""
    folders = [run.folder.resolve() for run in runs]
    if len({folder.name for folder in folders}) == len(folders):
        return [folder.name for folder in folders]
    common = os.path.commonpath([folder.parent for folder in folders])
    return [str(folder.relative_to(common)) for folder in folders]


def source_of(run: Run) -> tuple[Any, ...]:
    """What tells one source from another; of a manifest's clips, the name."""
    chosen = {k: v for k, v in run.settings.items() if k.startswith("data.")}
    return (chosen, run.name if "data.manifest" in chosen else None)


def floors(
    runs: Sequence[tuple[str, Run]], columns: Sequence[str]
) -> list[tuple[str, tuple[str, ...]]]:
    """Rows of what sources are after the VAE alone, named by their runs unless all share one."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for run_name, run in runs:
        if run.round_trip:
            row = tuple(measured(name, [run.round_trip.get(name)], {})[0].text for name in columns)
            rows.setdefault(row, []).append(run_name)
    what = "VAE round trip"
    return [
        (what if len(names) == len(runs) else f"{what} of {', '.join(names)}", row)
        for row, names in rows.items()
    ]


def unite(mappings: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """For every name that any has, in their order, all values; None where one lacks it."""
    names = dict.fromkeys(name for mapping in mappings for name in mapping)
    return {name: [mapping.get(name) for mapping in mappings] for name in names}


def differ(values: Sequence[Any]) -> bool:
    """Whether not all are the same."""
    return any(value != values[0] for value in values)


def number(value: Any) -> str:
    """A number with four significant digits, anything else as its text, nothing as a dash."""
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_page(template: str, output: Path, **values: Any) -> Path:
    """Fills in a template; whatever text comes in is escaped, as are names that are no UTF-8.

    The page allows no script but its own, and loads nothing.
    """
    environment = Environment(
        loader=PackageLoader("tokenflow.report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: printable_lines(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    here = files("tokenflow.report") / "templates"
    script, style = ((here / name).read_text("utf-8") for name in ("page.js", "style.css"))
    digest = b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = environment.get_template(template).render(
        script=Markup(script),
        style=Markup(style),
        digest=digest,
        version=version("tokenflow"),
        **values,
    )
    try:
        with atomic(output) as file:
            file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"{output} cannot be written ({error}); choose another --output"
        ) from error
    return output
