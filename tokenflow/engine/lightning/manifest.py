"""A list of clips to edit, from a YAML or CSV file."""

from __future__ import annotations

import csv
import inspect
import io
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser

from tokenflow.engine.lightning.job import CHOICE, PROMPTS, ClipSource, Job
from tokenflow.engine.settings import Settings
from tokenflow.errors import InputError
from tokenflow.storage.paths import local
from tokenflow.storage.safe_yaml import LARGEST, parse_yaml, require_once
from tokenflow.video import VideoError, image_paths, read_clip


def read_manifest(path: Path, root: Path | None, choice: Mapping[str, Any]) -> list[Job]:
    """One job for each row; a row's own options go before those of `choice`.

    Args:
        path: A YAML file with a list of mappings, or a CSV file with a line of names first. Each
            has `video`, and may have `prompt`, `negative_prompt`, `inversion_prompt`, `name` (of
            the folder that its files go to), options of the frames (as `start` or `resolution`)
            and of the edit (as `seed` or `steps`). An empty cell or value is not given.
        root: The folder that the videos are in, and relative to; the manifest's if not given.
        choice: Which frames are taken, of rows that do not say.

    Raises:
        InputError: The file is no manifest, a row is not understood, two would write into one
            folder, or a video, or an image of a folder, lies outside of the root.
    """
    root = (root or path.parent).resolve()
    options = Options()
    jobs = [job(row, f"{path}, clip {i}", options, root, choice) for i, row in rows(path)]
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


def filled(cell: str | list[str] | None) -> bool:
    """Whether a cell holds anything but space."""
    return bool(cell.strip() if isinstance(cell, str) else cell)


PLAIN = {int: re.compile(r"-?(0|[1-9]\d{0,17})"), float: re.compile(r"-?\d{1,15}\.\d{1,15}")}
"""Numbers as they are written by most."""


class Options:
    """What a row may say, with types; a value that many rows have is parsed once."""

    def __init__(self) -> None:
        self.settings = tuple(inspect.signature(Settings).parameters)
        hints = get_type_hints(read_clip) | get_type_hints(Settings)
        texts = dict.fromkeys(("video", "name", *PROMPTS), str)
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
            raise ValueError(f"{name!r} is no option; expected any of {', '.join(self.types)}")
        if type(value) is self.types[name]:  # no int that is a bool
            return value
        kinds = get_args(self.types[name]) or (self.types[name],)
        for kind, plain in PLAIN.items():  # most cells of a CSV file: no parser needs to look
            if kind in kinds and isinstance(value, str) and plain.fullmatch(value):
                return kind(value)
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
    where: str,
    options: Options,
    root: Path,
    choice: Mapping[str, Any],
) -> Job:
    """What one row says."""
    try:
        given = {name: options.parsed(name, value) for name, value in row.items()}
    except ValueError as error:
        raise InputError(f"{where}: {error}") from error
    if not given.get("video"):
        raise InputError(f"{where}: expected video: PATH, got none")
    video = root / local(given["video"])
    try:
        video.exists()  # raises where a name is too long
        paths = [video, *linked_images(video)]
        outside = [path for path in paths if not path.resolve().is_relative_to(root)]
    except (OSError, ValueError, RuntimeError) as error:  # a NUL in it, links in a circle
        raise InputError(f"{where}: {given['video']!r} is no path: {error}") from error
    if outside:
        raise InputError(
            f"{where}: {outside[0]} lies outside of {root}; move it there, or name another folder "
            f"by --data.root"
        )
    own = {key: value for key, value in given.items() if key in CHOICE}
    source = ClipSource(video, **{**choice, **own})
    prompts = {key: value for key, value in given.items() if key in PROMPTS}
    settings = {k: v for k, v in given.items() if k in options.settings}
    return Job(source, given.get("name"), prompts, settings, where)


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
