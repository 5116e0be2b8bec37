"""The prediction writer: a run's folder, whole or not at all."""

from __future__ import annotations

import platform
import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from itertools import starmap
from pathlib import Path
from typing import Any

import yaml
from jaxtyping import Float
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter, Callback
from torch import Tensor

from tokenflow.engine.lightning.callback import EditCallback, edit_callbacks
from tokenflow.engine.lightning.job import ClipSource, Job, Outcome
from tokenflow.engine.lightning.module import Prediction, TokenFlowModule
from tokenflow.engine.probe import Probe
from tokenflow.errors import InputError
from tokenflow.propagation import Correspondence, Window
from tokenflow.report import Run, draw, record_text, write_report
from tokenflow.runs.files import (
    COMPARE,
    EDITED,
    FAILED,
    FEATURES,
    MASK,
    RECORD,
    REPORT,
    SHEET,
    FolderLock,
    finished,
    require_free,
    staged,
)
from tokenflow.storage.atomic import atomic, require_room
from tokenflow.storage.paths import local
from tokenflow.text import printable, printable_lines
from tokenflow.video import (
    Clip,
    Frames,
    VideoError,
    contact_sheet,
    resized,
    side_by_side,
    write_clip,
    write_image,
    write_video,
)

PROBE = 1 << 20
"""Bytes that must have room on the disk before a clip is edited."""
PACKAGES = ("tokenflow", "torch", "lightning", "diffusers", "transformers", "av")


class RunWriter(BasePredictionWriter, EditCallback):
    """Writes `edited.mp4`, `compare.mp4`, `contact_sheet.png`, `report.html` and `run.yaml`.

    Of an edit with an automatic mask also `mask.mp4`.

    Args:
        folder: The run's files go to a folder of the clip's name in this one.
        overwrite: Replace the files of a finished run instead of refusing.
        crf: x264's quality of the videos: 0 is lossless, 51 worst.
    """

    def __init__(self, folder: str = "runs", overwrite: bool = False, crf: int = 16) -> None:
        super().__init__(write_interval="batch")
        if not 0 <= crf <= 51:
            raise InputError(f"crf is x264's quality from 0 to 51, got {crf}")
        self.folder, self.overwrite, self.crf = local(folder), overwrite, crf
        self.configuration: dict[str, Any] = {}
        self.allowed: list[str] = []
        self.typed: dict[str, str] = {}
        """Paths as they were typed, of which the configuration has the absolute ones."""
        self.outcomes: list[Outcome] = []
        self.failed = 0
        self.lock: FolderLock | None = None
        self.probe: Probe | None = None

    def admit(self, trainer: Trainer, module: LightningModule, job: Job) -> str | None:
        """Locks a job's folder for this run; or returns the reason why not, for one clip of many.

        Raises:
            InputError: The job's files may not or cannot be written.
        """
        folder = self.folder / job.name
        if reason := self.finished(job, folder):
            return reason
        self.check(job.source, folder)
        lock = FolderLock(folder)
        if lock.taken():
            self.lock = lock
            return self.finished(job, folder)  # by another run, just before this one had the lock
        if job.where is not None:
            return "another run has it now"
        raise InputError(
            f"another run writes to {folder} now; wait for it, or choose another --output.folder"
        )

    def on_edit_start(  # type: ignore[override]
        self, trainer: Trainer, module: TokenFlowModule, job: Job, frames: range
    ) -> None:
        assert module.backbone is not None, "setup comes before a clip"
        settings, sites = module.options(job)[1], module.backbone.sites()
        matched = any(site.matched for site in sites.values())
        propagated = settings.consistency == "tokenflow" and matched
        self.probe = Probe(sites, frames, settings.steps) if propagated else None

    def wants_correspondences(self, step: int) -> bool:
        return self.probe is not None and self.probe.wants(step)

    def on_correspondence(self, source: Tensor, window: Window, found: Correspondence) -> None:
        if self.probe is not None:
            self.probe(source, window, found)

    def finished(self, job: Job, folder: Path) -> str | None:
        """Why a clip among many is not edited again, if it is finished.

        Raises:
            InputError: The only clip is.
        """
        if self.overwrite or not finished(folder):
            return None
        if job.where is not None:
            return "finished before"
        raise InputError(
            f"{folder} holds a finished run; choose another --output.folder, or give "
            f"--output.overwrite true to replace it"
        )

    def check(self, source: ClipSource, folder: Path) -> None:
        """Raises `InputError` where a clip's files cannot be written."""
        if folder.resolve() in (source.path.resolve(), source.path.resolve().parent):
            raise InputError(
                f"the output would lie beside or in its source {source.path}; choose another "
                f"--output.folder"
            )
        try:
            require_free(folder)  # before a clip is edited for nothing
            require_room(folder, PROBE)
        except OSError as error:
            raise InputError(
                f"{folder} cannot be written ({error}); choose another --output.folder"
            ) from error

    def write_on_batch_end(  # type: ignore[override]
        self,
        trainer: Trainer,
        module: TokenFlowModule,
        prediction: Prediction | Outcome | None,
        indices: Any,
        job: Job,
        *_: Any,
    ) -> None:
        if prediction is None:
            return
        folder = self.folder / job.name
        if isinstance(prediction, Prediction):
            outcome = self.written(trainer, module, job, prediction)
        else:
            outcome = prediction
        # without the lock the folder is not this run's
        if outcome.status == "failed" and self.lock is not None:
            with suppress(OSError), atomic(folder / FAILED) as file:
                file.write_text(yaml.safe_dump({"failed": printable_lines(outcome.reason)}))
        self.release()
        if module.group.rank == 0:
            self.outcomes.append(outcome)
        if trainer.is_global_zero and outcome.status == "done":
            page = folder / REPORT
            with suppress(BrokenPipeError):  # other clips wait
                print(printable(f"{folder}: see {page}" if page.exists() else folder), flush=True)

    def written(
        self, trainer: Trainer, module: TokenFlowModule, job: Job, prediction: Prediction
    ) -> Outcome:
        """Writes an edited job's files; returns its status.

        Raises:
            InputError: The files of a clip that is not one of many cannot be written.
        """
        try:
            if module.group.rank == 0:
                self.write(trainer, module, job, prediction)
        except Exception as error:  # whatever is wrong with one clip, the others are edited
            if job.where is None:
                raise
            return Outcome(job, "failed", f"{type(error).__name__}: {error}")
        if prediction.result.checkpoint is not None:
            prediction.result.checkpoint.remove()
        return Outcome(job, "done", "", sum(prediction.result.seconds.values()))

    def on_exception(self, *_: Any) -> None:
        self.release()

    def release(self) -> None:
        """Gives the folder free that this run has taken."""
        if self.lock is not None:
            self.lock.release()
        self.lock = None

    def on_predict_end(self, trainer: Trainer, module: TokenFlowModule) -> None:  # type: ignore[override]
        """Prints the status of many clips, when all have been edited."""
        module.everyone.meet()
        gathered = module.everyone.all_gather_object(self.outcomes)
        every = [outcome for some in gathered for outcome in some]
        self.failed = sum(outcome.status == "failed" for outcome in every)
        if trainer.is_global_zero and any(outcome.many for outcome in every):
            print_outcomes(every)

    def write(
        self, trainer: Trainer, module: TokenFlowModule, job: Job, prediction: Prediction
    ) -> None:
        """Writes a run's files, which stand in its folder when all are there.

        Raises:
            InputError: The disk refuses.
            Preempted: The run was asked to stop; the folder holds what it held.
        """
        result, folder = prediction.result, self.folder / job.name
        source, edited = result.source, result.clip
        try:
            # a request does not interrupt the end of `staged`, where files take their places
            with staged(folder) as place, module.preemption.interruptible():
                write_clip(place / EDITED, edited, crf=self.crf)
                both = starmap(side_by_side, zip(shown(source), shown(edited), strict=True))
                write_video(
                    place / COMPARE, both, source.times, source.rate, end=source.end, crf=self.crf
                )
                if result.mask is not None:
                    write_video(
                        place / MASK, shown(result.mask), source.times, source.rate,
                        end=source.end, size=edited.display_size, crf=0,
                    )  # fmt: skip
                rows = source.frames, edited.frames
                write_image(place / SHEET, contact_sheet(rows, size=source.display_size))
                run = Run(folder, self.summary(job, prediction), place)
                for callback in edit_callbacks(trainer):
                    callback.on_run_staged(trainer, module, run)
                self.show(run, prediction)
                (place / RECORD).write_text(record_text(run.record))
        except (OSError, VideoError) as error:
            again = "free some space or choose another --output.folder, and start again"
            safe = result.checkpoint is not None and not result.checkpoint.cache.full
            keeps = "; the edit is in the cache, and the next run only writes it" if safe else ""
            refused = f"{folder} cannot be written ({error}): {again}"
            what = error if isinstance(error, VideoError) else refused
            raise InputError(f"{what}{keeps}") from error

    def show(self, run: Run, prediction: Prediction) -> None:
        """Writes the run's page; the run is whole without it."""
        try:
            seen = None if self.probe is None else self.probe.seen
            source = prediction.result.source.frames
            if seen is not None:
                draw(seen, source).save(run.place / FEATURES)
            write_report(run)
        except Exception as error:  # whatever it is, the videos are there
            warnings.warn(
                printable(
                    f"{run.folder / REPORT} is not written ({type(error).__name__}: {error}); "
                    f"tokenflow report {run.folder} tries again"
                ),
                stacklevel=2,
            )

    def summary(self, job: Job, prediction: Prediction) -> dict[str, Any]:
        """What `run.yaml` holds: the job's configuration, and under `run` what came of it."""
        result = prediction.result
        quality = {
            name: round(value, 2)
            for name in ("reconstruction_psnr", "round_trip_psnr")
            if (value := getattr(result, name)) is not None
        }
        record = {
            "frames": len(result.clip),
            **prediction.resolved,
            "seconds": result.seconds,
            **quality,
            "versions": {"python": platform.python_version()}
            | {name: version(name) for name in PACKAGES},
        }
        if self.typed:
            record["typed"] = self.typed
        if self.allowed:  # for the line that repeats the run; it allows nothing itself
            record["allow_imports"] = self.allowed
        return {**job.configured(self.configuration), "run": record}


def writer_of(trainer: Trainer) -> RunWriter:
    """The run's writer, among the callbacks."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next(callback for callback in callbacks if isinstance(callback, RunWriter))


def shown(clip: Clip) -> Frames:
    """A clip's frames at the size that its videos have."""

    def frame(position: int) -> Float[Tensor, "3 height width"]:
        return resized(clip.frame(position), clip.display_size)

    return Frames(frame, clip.positions, clip.display_size)


def print_outcomes(outcomes: Sequence[Outcome]) -> None:
    """A line for each clip, and how many are done, skipped and failed."""
    names = [printable(outcome.name) for outcome in outcomes]
    width = max(map(len, names), default=0)
    for name, outcome in zip(names, outcomes, strict=True):
        time = f"{outcome.seconds:8.1f} s" if outcome.seconds else " " * 10
        print(f"{name:{width}}  {outcome.status:7}  {time}  {printable(outcome.reason)}".rstrip())
    counts = Counter(outcome.status for outcome in outcomes)
    kinds = ("done", "skipped", "failed")
    print(f"{len(outcomes)} clips: " + ", ".join(f"{counts[kind]} {kind}" for kind in kinds))
