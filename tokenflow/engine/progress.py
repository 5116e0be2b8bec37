"""Progress of a run: which stage, which step, how long still."""

from __future__ import annotations

import sys
import time
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


class StageProgress(Callback):
    """A bar for each stage on a terminal; elsewhere a line at most every `interval` seconds."""

    def __init__(self, interval: float = 15.0) -> None:
        self.interval = interval
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
