"""A run's folder, as its page needs it."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from jaxtyping import Float
from torch import Tensor

from tokenflow.engine.folder import COMPARE, EDITED, FAILED, METRICS, RECORD, finished
from tokenflow.errors import InputError
from tokenflow.imports import OPTION
from tokenflow.video import Clip, Frames, halves, read_clip

QUALITY = ("reconstruction_psnr", "round_trip_psnr")
PACKAGES = {"editor": "editor.package", "propagation": "propagation.package"}


@dataclass(frozen=True)
class Run:
    """What a folder holds: the record is that of `run.yaml`, videos are read when asked for.

    `each` is called for each of their frames. As long as the run is written, its files are in
    `unfinished`.
    """

    folder: Path
    record: dict[str, Any]
    each: Callable[[], None] = lambda: None
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
        """What the record says of the run itself."""
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
        try:
            found: Any = json.loads(file.read_text())
        except ValueError as error:
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
        return {k: None if v is None else float(v) for k, v in found.items()}

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Every option of data and model by its name, with what its default came to."""
        chosen = flat("data", self.record.get("data")) | flat("", self.record.get("model"))
        left_out = {"seconds", "allow_imports", *QUALITY}
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
        clip = read_clip(self.place / name, in_memory=False, each=self.each)
        return clip.calling(self.each)


def flat(name: str, value: Any) -> dict[str, Any]:
    """A nested mapping with dotted names; a class's name stands for itself, before its options."""
    if not isinstance(value, dict):
        return {name: value} if value is not None and name else {}
    result: dict[str, Any] = {}
    for key, inner in value.items():
        own = name if key in ("class_path", "init_args") else f"{name}.{key}".strip(".")
        result |= flat(own, inner)
    return result


def read_run(folder: str | Path) -> Run:
    """The run that a folder holds.

    Raises:
        InputError: It holds no finished run.
    """
    folder = Path(folder)
    if not finished(folder):
        inside = sorted(file.parent.name for file in folder.glob(f"[!.]*/{RECORD}"))
        hint = f"; it holds runs in {', '.join(inside)}" if inside else ""
        hint = f"; its edit failed, as {FAILED} says" if (folder / FAILED).exists() else hint
        raise InputError(f"{folder}: expected a finished run's folder, with a {RECORD}{hint}")
    try:
        record = yaml.safe_load((folder / RECORD).read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{folder / RECORD} is no YAML: {error}") from error
    if not isinstance(record, dict):
        raise InputError(f"{folder / RECORD}: expected a run's record, got {record!r:.200}")
    came = record.get("run") or {}
    if not isinstance(came, dict) or not usable(came):
        raise InputError(
            f"{folder / RECORD} was changed by hand and cannot be used: expected of run: a "
            f"mapping, with numbers of seconds and names in allow_imports; edit again"
        )
    return Run(folder, record)


def usable(came: dict[str, Any]) -> bool:
    """Whether what a record says of its run has the types that are relied on."""
    seconds, allowed = came.get("seconds") or {}, came.get("allow_imports") or []
    return (
        isinstance(seconds, dict)
        and all(isinstance(value, int | float) for value in seconds.values())
        and isinstance(allowed, list)
        and all(isinstance(name, str) for name in allowed)
    )
