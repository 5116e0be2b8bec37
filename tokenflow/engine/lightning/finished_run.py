"""A finished run, read back: its source, its configuration, and the two clips."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenflow.engine.lightning.job import ClipSource
from tokenflow.engine.lightning.run_writer import shown
from tokenflow.errors import InputError
from tokenflow.report import Run, read_run
from tokenflow.runs.files import EDITED, RECORD
from tokenflow.storage.digests import of_path
from tokenflow.video import Clip, read_clip


@dataclass(frozen=True)
class FinishedRun:
    """A run's folder and its `run.yaml`.

    `source` is where the frames came from and which; `record` what came of the configuration:
    prompts, settings, `multiple`. The files are in `place`, which is the folder once the run is
    written.
    """

    folder: Path
    source: ClipSource
    record: dict[str, Any]
    place: Path

    @classmethod
    def read(cls, folder: Path) -> FinishedRun:
        """Reads `run.yaml`, in which paths are absolute.

        Raises:
            InputError: The folder holds no finished run, or its record cannot be used.
        """
        return cls.of(read_run(folder))

    @classmethod
    def of(cls, run: Run) -> FinishedRun:
        """A run by what its `run.yaml` holds, or is to hold.

        Raises:
            InputError: The record cannot be used.
        """
        folder = run.folder
        try:
            record = run.record["run"]
            source = ClipSource.of_record(record["source"])
            prompts = [record[name] for name in ("prompt", "inversion_prompt")]
            words = [*prompts, record.get("consistency", "tokenflow")]
            usable = type(record["multiple"]) is int and record["multiple"] >= 1
            usable = usable and all(isinstance(word, str) for word in words)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{folder / RECORD} is no record of a run of this version "
                f"({type(error).__name__}: {error}); compare the videos themselves by --source and "
                f"--edited, or edit again"
            ) from error
        if not usable:
            raise InputError(
                f"{folder / RECORD} was changed by hand and cannot be used; edit again"
            )
        return cls(folder, source, record, run.place)

    def require_unchanged(self) -> None:
        """Raises `InputError` for a source that is another than the run's, by its digest.

        While the run is written, its reader has seen to that.
        """
        inputs = self.record.get("inputs")
        known = inputs.get("data.video") if isinstance(inputs, dict) else None
        if self.place != self.folder or not isinstance(known, dict) or "sha256" not in known:
            return
        if of_path(self.source.path) != known["sha256"]:
            raise InputError(
                f"the source {self.source.path} of {self.folder} has changed since the run; edit "
                f"again, or give the videos by --source and --edited"
            )

    def clips(self) -> tuple[Clip, Clip]:
        """Source and edit, both as the run's videos show them.

        Raises:
            InputError: A video cannot be read.
        """
        if not self.source.path.exists():
            raise InputError(
                f"the source {self.source.path} of {self.folder} does not exist; put it there "
                f"again, or give the videos by --source and --edited"
            )
        self.require_unchanged()
        source = self.source.read(self.record["multiple"])
        edited = read_clip(self.place / EDITED, in_memory=False)
        frames = shown(source).in_memory_if_small()
        return dataclasses.replace(source, frames=frames), edited
