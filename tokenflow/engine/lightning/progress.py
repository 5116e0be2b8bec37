"""Progress of a run: which clip, which stage, which step, how fast, how long still."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from tokenflow.engine.lightning.callback import EditCallback
from tokenflow.engine.lightning.job import Job
from tokenflow.engine.lightning.module import Prediction, TokenFlow
from tokenflow.engine.settings import Settings
from tokenflow.text import printable


class StageProgress(EditCallback):
    """A bar for each stage on a terminal; elsewhere, and in a SLURM job, a line at most every
    `interval` seconds.

    While a clip is inverted, its edit's time is foretold by the number of the UNet's passes.

    Of many clips another bar counts the clips, or a line tells that one begins; none for those
    that are not edited. Of all processes only the first speaks, of the clips that it edits.
    """

    def __init__(self, interval: float = 15.0) -> None:
        self.interval = interval
        self.durations: list[float] = []  # of clips that were edited
        self.index, self.clip_began = 0, 0.0
        self.began: dict[str, tuple[float, int]] = {}  # first step of a stage, and when it ended
        self.ahead = 0.0  # how many times as long as inversion the edit takes
        self.said = 0.0
        self.bars: Progress | None = None
        self.tasks: dict[str, TaskID] = {}

    def on_predict_start(self, trainer: Trainer, module: TokenFlow) -> None:  # type: ignore[override]
        if not trainer.is_global_zero:
            return
        if on_terminal():
            self.bars = Progress(
                TextColumn("{task.description:>11}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[pace]}"),
                console=Console(stderr=True),
            )
            self.bars.start()

    def on_predict_batch_start(  # type: ignore[override]
        self, trainer: Trainer, module: TokenFlow, job: Job, index: int, *_: Any
    ) -> None:
        self.index, self.ahead = index, edit_to_inversion(module.options(job)[1])

    def on_edit_start(  # type: ignore[override]
        self, trainer: Trainer, module: TokenFlow, job: Job, frames: range
    ) -> None:
        if trainer.is_global_zero and job.where is not None:
            clips = len(trainer.datamodule.jobs)  # type: ignore[attr-defined]
            self.begin(job.name, self.index + 1, clips, module.groups)

    def on_edit_step(
        self, trainer: Trainer, module: LightningModule, stage: str, step: int, steps: int
    ) -> None:
        if trainer.is_global_zero:
            self.update(stage, step, steps)

    def on_predict_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, *_: Any
    ) -> None:
        if isinstance(outputs, Prediction) and trainer.is_global_zero:
            self.durations.append(time.monotonic() - self.clip_began)

    def begin(self, name: str, number: int, clips: int, at_once: int = 1) -> None:
        """A clip among many begins; so many are edited at the same time."""
        self.clip_began, self.began = time.monotonic(), {}
        each = sum(self.durations) / len(self.durations) / at_once if self.durations else 0.0
        how_fast = pace(each, clips - number + 1)
        if self.bars is not None:
            every = self.tasks.pop("clips", None)
            for task in self.tasks.values():
                self.bars.remove_task(task)
            if every is None:
                every = self.bars.add_task("clips", total=clips, pace="")
            self.tasks = {"clips": every}
            self.bars.update(every, completed=number - 1, pace=how_fast)
        else:
            say(f"clip {number}/{clips}, {name}", how_fast)

    def on_predict_end(self, trainer: Trainer, module: LightningModule) -> None:
        if self.bars is not None and "clips" in self.tasks:
            task = self.bars.tasks[self.tasks["clips"]]
            self.bars.update(task.id, completed=task.total, pace="")
        self.stop()

    def on_exception(self, *_: Any) -> None:
        self.stop()

    def stop(self) -> None:
        """Leaves the terminal as it was."""
        if self.bars is not None:
            self.bars.stop()

    def update(self, stage: str, step: int, steps: int) -> None:
        """A step of a stage is done."""
        now = time.monotonic()
        # how long the first step took is not known; after an interruption it is not number 1
        began, first = self.began.setdefault(stage, (now, step))
        each = (now - began) / max(step - first, 1)
        how_fast = pace(each, steps - step)
        if stage == "cached":  # the edit is of these frames, too
            self.ahead *= steps / max(steps - step, 1)
        elif stage == "invert" and each and self.ahead:
            whole = timedelta(seconds=round(each * (steps - step + self.ahead * steps)))
            how_fast += f", about {whole} with the edit"
        if self.bars is not None:
            if stage not in self.tasks:
                self.tasks[stage] = self.bars.add_task(stage, total=steps, pace="")
            self.bars.update(self.tasks[stage], completed=step, pace=how_fast)
        elif step == steps or now - self.said >= self.interval:
            self.said = now
            say(f"{stage}: {step}/{steps}", how_fast)


def edit_to_inversion(settings: Settings) -> float:
    """The edit's passes of the UNet over the inversion's, for each frame.

    Three branches at every step, of the frame and of its part of the keyframes.
    """
    keyframes = 1 / settings.keyframe_every if settings.consistency == "tokenflow" else 0.0
    return 3 * (1 + keyframes) * settings.steps / (settings.inversion_steps or settings.steps)


def on_terminal() -> bool:
    """Whether someone looks on: there is a terminal, and it is not that of a SLURM job."""
    return sys.stderr.isatty() and "SLURM_JOB_ID" not in os.environ


def pace(each: float, left: int) -> str:
    """How fast things go that take so many seconds each, and the time for those that are left.

    Nothing where it is not known, which is 0.
    """
    if not each:
        return ""
    rate = f"{each:.1f} s each" if each >= 1 else f"{1 / each:.1f} a second"
    return f"{rate}, {timedelta(seconds=round(each * left))} left"


def say(*parts: str) -> None:
    """A line of the parts that are not empty."""
    with suppress(OSError):  # whoever listens is gone; the clip is edited all the same
        print(printable(", ".join(filter(None, parts))), file=sys.stderr, flush=True)
