"""A run's folder, as its page needs it."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from jaxtyping import Float
from torch import Tensor

from tokenflow.errors import InputError
from tokenflow.plugins import OPTION
from tokenflow.runs.files import COMPARE, EDITED, FAILED, METRICS, RECORD, finished
from tokenflow.storage.paths import local
from tokenflow.storage.safe_yaml import parse_yaml
from tokenflow.video import Clip, Frames, described, halves, read_clip

QUALITY = ("reconstruction_psnr", "round_trip_psnr")
PACKAGES = {"editor": "editor.package", "propagation": "propagation.package"}


@dataclass(frozen=True)
class Run:
    """What a folder holds: the record is that of `run.yaml`, videos are read on demand.

    As long as the run is written, its files are in `unfinished`.
    """

    folder: Path
    record: dict[str, Any]
    unfinished: Path | None = None

    @property
    def place(self) -> Path:
        """Where its files are now."""
        return self.unfinished or self.folder

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.resolve().name

    @property
    def came(self) -> dict[str, Any]:
        """The record's part about the run itself."""
        return self.record.get("run") or {}

    @property
    def seconds(self) -> dict[str, float]:
        """How long each stage took."""
        return self.came.get("seconds") or {}

    @cached_property
    def metrics(self) -> dict[str, float | None]:
        """Numbers that tell how good the edit is: the record's, and those of `metrics.json`.

        Raises:
            InputError: That file has no mapping from names to numbers.
        """
        known = {name: self.came[name] for name in QUALITY if name in self.came}
        return known | self.measured("metrics")

    @cached_property
    def round_trip(self) -> dict[str, float | None]:
        """The same numbers of the source after the VAE alone, where `metrics.json` has them.

        Raises:
            InputError: That file has no mapping from names to numbers.
        """
        return self.measured("round_trip")

    def measured(self, what: str) -> dict[str, float | None]:
        """Numbers of `metrics.json` by their names."""
        file = self.place / METRICS
        if not file.exists():
            return {}
        if not file.is_file():  # reading a FIFO would wait for its writer
            raise InputError(f"{file} is no file; remove it, and measure the run again")
        try:
            found: Any = json.loads(file.read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{file} is no JSON ({error}); measure the run again") from error
        if what == "round_trip" and isinstance(found, dict) and found.get(what) is None:
            return {}
        found = found.get(what) if isinstance(found, dict) else found
        numbers = isinstance(found, dict) and all(
            value is None or (isinstance(value, int | float) and not isinstance(value, bool))
            for value in found.values()
        )
        if not numbers:
            raise InputError(f"{file}: expected {what}, names with numbers, got {found!r:.200}")
        try:
            return {k: None if v is None else float(v) for k, v in found.items()}
        except OverflowError as error:  # a whole number of hundreds of digits
            raise InputError(f"{file}: expected numbers of {what}: {error}") from error

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Every option of data and model by its name, with what its default came to."""
        own = self.came.get("model")  # a manifest's row has its own editor or kernel
        model = (self.record.get("model") or {}) | (own if isinstance(own, dict) else {})
        chosen = flat("data", self.record.get("data")) | flat("", model)
        left_out = {"seconds", "allow_imports", "inputs", "typed", "model", *QUALITY}
        came = {PACKAGES.get(k, k): v for k, v in self.came.items() if k not in left_out}
        return chosen | flat("", came)

    @property
    def allowed(self) -> list[str]:
        """The packages that the command line allowed the configuration to name."""
        return self.came.get("allow_imports") or []

    @property
    def repeat(self) -> str:
        """The command that makes this run again, in another folder."""
        runs = self.folder.resolve().parent  # `.` and `..` have no names
        again = runs.parent / f"{runs.name}-again"
        if not self.folder.is_absolute():
            again = Path(os.path.relpath(again))
        words = ["--config", str(self.folder / RECORD), "--output.folder", str(again)]
        words += [word for name in self.allowed for word in (OPTION, name)]
        return shlex.join(["tokenflow", "predict", *words])

    def source(self) -> Clip:
        """The source's frames, as `compare.mp4` shows them."""
        both = self.video(COMPARE)

        def left(number: int) -> Float[Tensor, "3 height width"]:
            return halves(both.frames[number])[0]

        height, width = left(0).shape[1:]
        return dataclasses.replace(both, frames=Frames(left, both.positions, (height, width)))

    def edited(self) -> Clip:
        """The edited frames."""
        return self.video(EDITED)

    @property
    def sound(self) -> bool:
        """Whether the edited video has sound."""
        return read_clip(self.place / EDITED, max_frames=1).audio is not None

    def video(self, name: str) -> Clip:
        """One of the folder's videos, not in memory."""
        return read_clip(self.place / name, in_memory=False)


def flat(name: str, value: Any) -> dict[str, Any]:
    """A nested mapping with dotted names; a class's name stands for itself, before its options.

    Of a class path that is the last part: which package's class it is, the record says beside it.
    """
    if not isinstance(value, dict):
        return {name: value} if value is not None and name else {}
    result: dict[str, Any] = {}
    for key, inner in value.items():
        if key == "class_path" and isinstance(inner, str):
            inner = inner.rsplit(".", 1)[-1]
        own = name if key in ("class_path", "init_args") else f"{name}.{key}".strip(".")
        result |= flat(own, inner)
    return result


def read_run(folder: str | Path) -> Run:
    """The run that a folder holds.

    Raises:
        InputError: It holds no finished run.
    """
    folder = local(folder)
    if not finished(folder):
        inside = sorted(file.parent.name for file in folder.glob(f"[!.]*/{RECORD}"))
        hint = f"; it holds runs in {', '.join(inside)}" if inside else ""
        hint = f"; its edit failed, as {FAILED} says" if (folder / FAILED).exists() else hint
        raise InputError(f"{folder}: expected a finished run's folder, with a {RECORD}{hint}")
    if not (folder / RECORD).is_file():  # reading a FIFO would wait for its writer
        raise InputError(f"{folder / RECORD} is no file; expected a run's record")
    try:
        text = (folder / RECORD).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{folder / RECORD} cannot be read: {error}") from error
    record = as_names(parse_yaml(text, str(folder / RECORD)))
    if not isinstance(record, dict):
        raise InputError(f"{folder / RECORD}: expected a run's record, got {record!r:.200}")
    came = record.get("run") or {}
    if not isinstance(came, dict) or not usable(came):
        raise InputError(
            f"{folder / RECORD} was changed by hand and cannot be used: expected of run: a "
            f"mapping, with numbers of seconds and names in allow_imports; edit again"
        )
    return Run(folder, record)


def require_shown(run: Run) -> None:
    """Raises `InputError` for a run of which a page of several could not show all that it has."""
    require_alike(run.source(), run.edited(), run)
    _ = run.settings, run.metrics, run.round_trip, run.sound


def require_alike(source: Clip, edited: Clip, run: Run) -> None:
    """Raises `InputError` where a run's videos are not of one size and length."""
    if source.frames.shape != edited.frames.shape:
        raise InputError(
            f"expected {run.place / COMPARE} to show the frames of {EDITED} beside their source, "
            f"got {described(source.frames)} there and {described(edited.frames)} here; edit again"
        )


class RecordDumper(yaml.SafeDumper):
    """Writes names that are no UTF-8 as their bytes: YAML's escapes of them are read by few."""

    def represent_name(self, name: str) -> yaml.Node:
        try:
            name.encode()
        except UnicodeEncodeError:
            return self.represent_binary(name.encode(errors="surrogateescape"))
        return self.represent_str(name)


RecordDumper.add_representer(str, RecordDumper.represent_name)


def record_text(record: dict[str, Any]) -> str:
    """What `run.yaml` holds of a run; `read_run` reads it."""
    return yaml.dump(record, Dumper=RecordDumper, sort_keys=False)


def as_names(value: Any) -> Any:
    """A record's values, with bytes as the names that they are of."""
    if isinstance(value, dict):
        return {key: as_names(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [as_names(inner) for inner in value]
    return os.fsdecode(value) if isinstance(value, bytes) else value


def usable(came: dict[str, Any]) -> bool:
    """Whether what a record says of its run has the types that are relied on."""
    seconds, allowed = came.get("seconds") or {}, came.get("allow_imports") or []
    return (
        isinstance(seconds, dict)
        and all(isinstance(value, int | float) for value in seconds.values())
        and isinstance(allowed, list)
        and all(isinstance(name, str) for name in allowed)
    )
