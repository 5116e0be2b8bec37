"""Callbacks that interrupt their own process at a chosen moment, and that note its steps."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from threading import Timer
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

import tokenflow.engine.lightning.job
import tokenflow.engine.lightning.run_writer
import tokenflow.engine.ranks.preemption
from tokenflow.diffusion import Backbone, Source
from tokenflow.editors import PnP, Step
from tokenflow.engine.lightning.callback import EditCallback
from tokenflow.video import Clip

PATIENCE = 60
"""Seconds that a block takes which only a request to stop ends."""


class KillAt(EditCallback):
    """Sends a signal to this process at a moment, if it has this rank.

    Args:
        moment: "read", "invert", "edit" or "write": in the midst of that; "begin", "meet" or "end":
            half a second after the first clip's begin, its end, or the end of all.
        rank: Whose process.
        sent: The signal's number.
    """

    def __init__(self, moment: str, rank: int, sent: int = int(signal.SIGKILL)) -> None:
        self.moment, self.rank, self.sent = moment, rank, sent

    def on_predict_start(self, trainer: Trainer, module: LightningModule) -> None:
        if self.sent != signal.SIGKILL:  # a rank that waits for another in vain hangs
            tokenflow.engine.ranks.preemption.GRACE = torch.inf
        if trainer.global_rank != self.rank:
            self.moment = ""
        elif self.moment == "read":
            tokenflow.engine.lightning.job.read_clip = self.then_slow  # type: ignore[assignment]
        elif self.moment == "write":
            tokenflow.engine.lightning.run_writer.write_video = self.then_slow  # type: ignore[assignment]

    def on_predict_batch_start(self, *_: Any) -> None:
        if self.moment == "begin":
            self.soon()

    def on_edit_step(
        self, trainer: Trainer, module: LightningModule, stage: str, step: int, steps: int
    ) -> None:
        if stage == self.moment and step == max(1, steps // 2):
            self.kill()

    def on_predict_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, job: Any, index: int, *_: Any
    ) -> None:
        if self.moment == "meet" and index == 0:
            self.soon()

    def on_predict_epoch_end(self, *_: Any) -> None:
        if self.moment == "end":
            self.soon()

    def soon(self) -> None:
        Timer(0.5, self.kill).start()

    def then_slow(self, *_: Any, **__: Any) -> Any:
        self.kill()
        slow()

    def kill(self) -> None:
        os.kill(os.getpid(), self.sent)


def slow(*_: Any, **__: Any) -> Any:
    """A block that only a request to stop ends."""
    for _ in range(10 * PATIENCE):
        time.sleep(0.1)
    raise AssertionError("a request to stop does not end it")


class Slow(EditCallback):
    """Has one rank read or write for `PATIENCE`, unless a request to stop ends it.

    Args:
        rank: Which.
        what: "read" or "write".
    """

    def __init__(self, rank: int = 0, what: str = "write") -> None:
        self.rank, self.what = rank, what

    def on_predict_start(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.global_rank == self.rank and self.what == "read":
            tokenflow.engine.lightning.job.read_clip = slow
        elif trainer.global_rank == self.rank:
            tokenflow.engine.lightning.run_writer.write_video = slow


class Hasty(EditCallback):
    """Has a rank that stops wait less long for the others."""

    def __init__(self) -> None:
        tokenflow.engine.ranks.preemption.GRACE = 2.0


class Noting(EditCallback):
    """Adds a line to a file for every step that the first rank takes, with the stage's name.

    Args:
        file: Where.
    """

    def __init__(self, file: str) -> None:
        self.file = Path(file)

    def on_edit_step(
        self, trainer: Trainer, module: LightningModule, stage: str, step: int, steps: int
    ) -> None:
        if trainer.is_global_zero:
            with self.file.open("a") as file:
                file.write(f"{stage}\n")


class Fragile(PnP):
    """Fails on the last rank with clips "error" (before sampling), "pass" (in it), and "nan"."""

    def prepare(self, model: Backbone, clip: Clip) -> None:
        super().prepare(model, clip)
        last = not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1
        self.clip = clip.name if last else ""
        if self.clip == "error":
            raise ValueError("not this clip")

    def advance(
        self, x: Tensor, outputs: Mapping[str, Tensor], step: Step, source: Source
    ) -> Tensor:
        if self.clip == "pass":
            raise ValueError("not in this pass")
        return super().advance(x, outputs, step, source) * (torch.nan if self.clip == "nan" else 1)
