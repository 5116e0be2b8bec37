"""Progress of a run: which clip, which stage, which step, how long still."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from tokenflow.engine.job import Job
from tokenflow.engine.module import Prediction, TokenFlow


class StageProgress(Callback):
    """A bar for each stage on a terminal; elsewhere a line at most every `interval` seconds.

    Of many clips another bar counts the clips, or a line tells that one begins.
    """

    def __init__(self, interval: float = 15.0) -> None:
        self.interval = interval
        self.durations: list[float] = []  # of clips that were edited
        self.clip_began = 0.0
        self.began: dict[str, float] = {}
        self.said = 0.0
        self.bars: Progress | None = None
        self.tasks: dict[str, TaskID] = {}

    def on_predict_start(self, trainer: Trainer, module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        module.progress = self.update  # type: ignore[assignment]
        if sys.stderr.isatty():
            self.bars = Progress(
                TextColumn("{task.description:>11}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self.bars.start()

    def on_predict_batch_start(  # type: ignore[override]
        self, trainer: Trainer, module: TokenFlow, job: Job, index: int, *_: Any
    ) -> None:
        if not trainer.is_global_zero or index % module.groups != module.number:
            return
        if job.where is not None:
            clips = len(trainer.datamodule.jobs)  # type: ignore[attr-defined]
            self.begin(job.name, index + 1, clips, module.groups)

    def on_predict_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, *_: Any
    ) -> None:
        if isinstance(outputs, Prediction) and trainer.is_global_zero:
            self.durations.append(time.monotonic() - self.clip_began)

    def begin(self, name: str, number: int, clips: int, at_once: int = 1) -> None:
        """A clip among many begins; so many are edited at the same time."""
        self.clip_began, self.began = time.monotonic(), {}
        if self.bars is not None:
            every = self.tasks.pop("clips", None)
            for task in self.tasks.values():
                self.bars.remove_task(task)
            if every is None:
                every = self.bars.add_task("clips", total=clips)
            self.tasks = {"clips": every}
            self.bars.update(every, completed=number - 1)
        else:
            mean = sum(self.durations) / max(len(self.durations), 1)
            left = timedelta(seconds=round(mean * (clips - number + 1) / at_once))
            known = f", {left} left" if self.durations else ""
            print(f"clip {number}/{clips}, {name}{known}", file=sys.stderr, flush=True)

    def on_predict_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.stop()

    def on_exception(self, *_: Any) -> None:
        self.stop()

    def stop(self) -> None:
        """Leaves the terminal as it was."""
        if self.bars is not None:
            self.bars.stop()

    def update(self, stage: str, step: int, steps: int) -> None:
        """What `edit_clip` calls after every step."""
        now = time.monotonic()
        began = self.began.setdefault(stage, now)
        if self.bars is not None:
            if stage not in self.tasks:
                self.tasks[stage] = self.bars.add_task(stage, total=steps)
            self.bars.update(self.tasks[stage], completed=step)
        elif step == steps or now - self.said >= self.interval:
            self.said = now
            # the first step's own duration is not known
            left = (now - began) / (step - 1) * (steps - step) if step > 1 else float("nan")
            known = f", {left:.0f} s left" if step > 1 else ""
            print(f"{stage}: {step}/{steps}{known}", file=sys.stderr, flush=True)
