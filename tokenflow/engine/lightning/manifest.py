"""A list of clips to edit, and of sweeps over options, from a YAML or CSV file."""

from __future__ import annotations

import csv
import inspect
import io
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser

from tokenflow.engine.lightning.job import CHOICE, PLUGINS, PROMPTS, Choice, ClipSource, Job
from tokenflow.engine.region import AUTO
from tokenflow.engine.settings import Settings
from tokenflow.errors import InputError
from tokenflow.plugins import did_you_mean
from tokenflow.storage.paths import local
from tokenflow.storage.safe_yaml import LARGEST, parse_yaml, require_once
from tokenflow.video import VideoError, image_paths, read_clip


def read_manifest(path: Path, root: Path | None, choice: Mapping[str, Any]) -> list[Job]:
    """One job for each row; a row's own options go before those of `choice`.

    Args:
        path: A YAML file with a list of mappings, or a CSV file with a line of names first. Each
            has `video`, and may have `prompt`, `negative_prompt`, `inversion_prompt`, `name` (of
            the folder that its files go to), `mask` (of metrics), `edit_mask` and `depth` (as
            `--model.mask` and `--model.depth`), options of the frames (as `start`) and of the edit
            (as `seed` or `steps`), `editor` and `propagation` (a class name, or class_path and
            init_args) and their options (as `editor.features`). A `grid` of names and lists of
            values makes a clip for each combination of them. An empty cell or value is not given.
        root: The folder that the files are in, and relative to; the manifest's if not given.
        choice: Which frames are taken, of rows that do not say.

    Raises:
        InputError: The file is no manifest, a row is not understood, two would write into one
            folder, or a file lies outside of the root.
    """
    root = (root or path.parent).resolve()
    options = Options()
    jobs = [
        job(one, suffix, f"{path}, clip {i}", options, root, choice)
        for i, row in rows(path)
        for one, suffix in combinations(row, f"{path}, clip {i}")
    ]
    if not jobs:
        raise InputError(f"{path} lists no clip; expected at least one, with a video")
    names = Counter(job.name for job in jobs)
    if twice := [name for name, count in names.items() if count > 1]:
        raise InputError(
            f"{path}: several clips would write into the folder {twice[0]!r}; give each a name"
        )
    return jobs


def rows(path: Path) -> Sequence[tuple[int, dict[str, Any]]]:
    """The rows of a manifest, counted from 1."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets begin with a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the manifest {path} cannot be read: {error}") from error
    if path.suffix.lower() == ".csv":
        try:
            reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
            require_once(reader.fieldnames or ())
            lines = [line for line in reader if any(map(filled, line.values()))]
        except (csv.Error, ValueError) as error:
            raise InputError(f"the manifest {path} is no CSV: {error}") from error
        for number, line in enumerate(lines, start=1):
            if None in line:
                raise InputError(
                    f"{path}, clip {number}: expected {len(line) - 1} cells, as the first line "
                    f"has, and there are more; put a text with a comma in quotes"
                )
        table: Any = [{k: v or None for k, v in line.items()} for line in lines]
    elif path.suffix.lower() in (".yaml", ".yml"):
        table = parse_yaml(text, f"the manifest {path}")
    else:
        raise InputError(f"expected a manifest that ends in .yaml, .yml or .csv, got {path}")
    if not isinstance(table, list) or not all(isinstance(row, dict) for row in table):
        raise InputError(f"{path}: expected a list of clips, each with video: PATH")
    given = ({k: v for k, v in row.items() if v is not None} for row in table)
    return list(enumerate(given, start=1))


def combinations(row: Mapping[str, Any], where: str) -> Iterator[tuple[dict[str, Any], str]]:
    """The rows that a row with a `grid` stands for, each with what its folder's name ends in."""
    own = {name: value for name, value in row.items() if name != "grid"}
    if "grid" not in row:
        yield own, ""
        return
    grid = row["grid"]
    lists = isinstance(grid, dict) and all(isinstance(v, list) and v for v in grid.values())
    if not lists or not grid:
        raise InputError(
            f"{where}: expected a grid of options with a list of values each, as grid: "
            f"{{seed: [1, 2]}}, got {grid!r:.200}"
        )
    if taken := [name for name in grid if name in ("video", "name", "grid") or name in own]:
        raise InputError(
            f"{where}: {taken[0]!r} cannot be in the grid: expected options that the row does not "
            f"give itself, and none of video, name and grid; give it a row of its own"
        )
    if (size := prod(map(len, grid.values()))) > MOST:
        raise InputError(f"{where}: the grid has {size} combinations, expected at most {MOST}")
    labels = {name: labelled(values) for name, values in grid.items()}
    for numbers in product(*(range(len(values)) for values in grid.values())):
        chosen = dict(zip(grid, numbers, strict=True))
        values = {name: grid[name][number] for name, number in chosen.items()}
        suffix = "".join(f"_{name}={labels[name][n]}" for name, n in chosen.items())
        yield own | {k: v for k, v in values.items() if v is not None}, suffix


def labelled(values: Sequence[Any]) -> list[str]:
    """A short text for each value, fit for the name of a folder, no two alike."""
    texts = [re.sub(r"[^\w.+-]+", "-", label(value)).strip("-")[:LABEL] for value in values]
    return [f"{text}-{n}" if texts.count(text) > 1 else text for n, text in enumerate(texts, 1)]


def label(value: Any) -> str:
    """A value in words; a class by its name, before its options."""
    if isinstance(value, dict):
        named = str(value.get("class_path", "")).split(".")[-1]
        options = value.get("init_args") or {}
        return " ".join([named, *(f"{k} {label(v)}" for k, v in dict(options).items())])
    return str(value)


def filled(cell: str | list[str] | None) -> bool:
    """Whether a cell holds anything but space."""
    return bool(cell.strip() if isinstance(cell, str) else cell)


LABEL = 40
"""Characters of a value in a folder's name."""
MOST = 10_000
"""Combinations of one grid."""
PATHS = ("mask", "edit_mask", "depth")
"""What a row gives beside its video."""
FILES = {"ControlVideo": "path", "FlowFiles": "folder", "IPAdapter": "image", "RAFT": "weights"}
"""Which option of a class names a file or folder that it reads."""


class Options:
    """What a row may say, with types; a value that many rows have is parsed once."""

    def __init__(self) -> None:
        self.settings = tuple(inspect.signature(Settings).parameters)
        hints = get_type_hints(read_clip) | get_type_hints(Settings)
        texts = dict.fromkeys(("video", "name", *PATHS, *PROMPTS), str)
        self.types = texts | {name: hints[name] for name in (*CHOICE, *self.settings)}
        # one for each, as a parser looks at all of its options for any value
        self.parsers = {name: ArgumentParser(exit_on_error=False) for name in self.types}
        for name, parser in self.parsers.items():
            parser.add_argument(f"--{name}", type=self.types[name])
        self.known: dict[tuple[str, str], Any] = {}

    def parsed(self, name: Any, value: Any) -> Any:
        """An option's value in its type.

        Raises:
            ValueError: There is no such option, or the value is not of its type.
        """
        if name not in self.types:
            others = ", ".join(
                (*self.types, *PLUGINS, "editor.OPTION", "propagation.OPTION", "grid")
            )
            close = did_you_mean(str(name), [*self.types, *PLUGINS, "grid"])
            raise ValueError(f"{name!r} is no option{close}; expected any of {others}")
        if type(value) is self.types[name]:  # no int that is a bool
            return value
        key = name, repr(value)
        if key not in self.known:
            try:
                found = self.parsers[name].parse_object({name: value})[name]
            except (ArgumentError, TypeError, ValueError, OverflowError) as error:
                raise ValueError(str(error)) from error
            if isinstance(found, int) and abs(found) >= LARGEST:
                raise ValueError(f"expected {name} of at most 64 bits, got {value!r:.20}…")
            self.known[key] = found
        return self.known[key]


def job(
    row: Mapping[str, Any],
    suffix: str,
    where: str,
    options: Options,
    root: Path,
    choice: Mapping[str, Any],
) -> Job:
    """What one row says."""
    try:
        plugins = {name: chosen(row, name) for name in PLUGINS}
        given = {
            name: options.parsed(name, value)
            for name, value in row.items()
            if str(name).split(".")[0] not in PLUGINS
        }
        if not given.get("video"):
            raise ValueError("expected video: PATH, got none")
        video = inside(root, given["video"])
        paths: dict[str, Any] = {n: inside(root, given[n]) for n in PATHS if given.get(n)}
        if given.get("edit_mask") == AUTO:
            paths["edit_mask"] = AUTO
    except ValueError as error:
        raise InputError(f"{where}: {error}") from error
    own = {key: value for key, value in given.items() if key in CHOICE}
    source = ClipSource(video, **{**choice, **own})
    prompts = {key: value for key, value in given.items() if key in PROMPTS}
    settings = {k: v for k, v in given.items() if k in options.settings}
    made = {name: Choice(spec, root) for name, spec in plugins.items() if spec}
    name = given.get("name", source.name if suffix else None)
    name = name if name is None else f"{name}{suffix}"
    return Job(source, name, prompts, settings, where, made, **paths)


def chosen(row: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A row's own editor or kernel, as a configuration has it; empty where it has none.

    Raises:
        ValueError: It is none.
    """
    spec = row.get(name, {})
    spec = {"class_path": spec} if isinstance(spec, str) else spec
    known = isinstance(spec, dict) and set(spec) <= {"class_path", "init_args"}
    if not known or not isinstance(spec.get("class_path", ""), str):
        raise ValueError(
            f"expected {name} as a class name, or class_path and init_args, got {spec}"
        )
    arguments = spec.get("init_args") or {}
    if not isinstance(arguments, dict) or not all(isinstance(key, str) for key in arguments):
        raise ValueError(
            f"expected init_args of {name} as a mapping from names of options to values, got "
            f"{arguments!r:.200}"
        )
    prefix = f"{name}."
    single = {k.removeprefix(prefix): v for k, v in row.items() if str(k).startswith(prefix)}
    return {**spec, "init_args": {**arguments, **single}} if single else dict(spec)


def inside(root: Path, path: str) -> Path:
    """A path that a row gives, relative to the root and in it, links resolved.

    Raises:
        ValueError: It is none, or lies outside, or one of the images of a folder does.
    """
    whole = root / local(path)
    try:
        whole.exists()  # raises where a name is too long
        paths = [whole, *linked_images(whole)]
        outside = [path for path in paths if not path.resolve().is_relative_to(root)]
    except (OSError, ValueError, RuntimeError) as error:  # a NUL in it, links in a circle
        raise ValueError(f"{path!r} is no path: {error}") from error
    if outside:
        raise ValueError(
            f"{outside[0]} lies outside of {root}; move it there, or name another folder "
            f"by --data.root"
        )
    return whole


def linked_images(folder: Path) -> list[Path]:
    """Those images of a folder that are links; none of what cannot be read, which fails later."""
    with suppress(OSError):
        return [path for path in image_paths(folder) if path.is_symlink()]
    return []


def part_of(jobs: Sequence[Job], part: str) -> list[Job]:
    """Every n-th job, from the m-th, for the part "m/n"."""
    try:
        m, n = map(int, part.split("/"))
        if not 1 <= m <= n:
            raise ValueError
    except ValueError:
        raise VideoError(
            f'expected a part like "3/16", the third of sixteen, got {part!r}'
        ) from None
    return list(jobs[m - 1 :: n])
