"""Callbacks that kill their own process, as nothing can foresee, and that look on."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

import tokenflow.engine.lightning.job
import tokenflow.engine.lightning.run_writer
import tokenflow.engine.ranks.channel

FILES = {"write": "edited.mp4", "compare": "compare.mp4"}
PATIENCE = 60


class KillAt(Callback):
    """Sends `sent` to this process at a moment of the first clip, if it has this rank.

    Args:
        moment: "read", "invert", "edit", "write" (edited.mp4), "compare" (compare.mp4), "wait" (for
            who writes it), "between", after the first clip, or "end", when all are waited for.
        rank: Whose process.
        sent: The signal's number.
        note: A file that gets the time when it was sent.
    """

    def __init__(
        self, moment: str, rank: int, sent: int = int(signal.SIGKILL), note: str = os.devnull
    ) -> None:
        self.moment, self.rank, self.sent, self.note = moment, rank, sent, Path(note)

    def on_predict_batch_start(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if trainer.global_rank != self.rank:
            return
        before: Any = module.progress

        def progress(stage: str, step: int, steps: int) -> None:
            before(stage, step, steps)
            if stage == self.moment and step == max(1, steps // 2):
                self.kill()

        module.progress = progress  # type: ignore[assignment]
        if self.moment == "read":
            read, seen = tokenflow.engine.lightning.job.read_clip, []

            def interrupted(*args: Any, each: Callable[[], None], **options: Any) -> Any:
                def after() -> None:
                    seen.append(None)
                    if len(seen) == 2:
                        self.kill()
                    each()
                    assert len(seen) < 2, "reading goes on after a signal"

                return read(*args, each=after, **options)

            tokenflow.engine.lightning.job.read_clip = interrupted
        if file := FILES.get(self.moment):
            write = tokenflow.engine.lightning.run_writer.write_video

            def killed(path: Path, frames: Any, *args: Any, **options: Any) -> Any:
                def some() -> Any:
                    for index, frame in enumerate(frames):
                        if path.name == file and index == 2:
                            self.kill()
                        yield frame

                return write(path, some(), *args, **options)

            tokenflow.engine.lightning.run_writer.write_video = killed
        if self.moment == "end":
            meet = module.everyone.meet

            def meeting(own: Any) -> Any:
                self.kill()
                return meet(own)

            module.everyone.meet = meeting  # type: ignore[method-assign, union-attr]
        if self.moment == "wait":
            alone = module.group.first_alone

            def waiting(work: Any) -> None:
                self.kill()
                alone(work)

            module.group.first_alone = waiting  # type: ignore[method-assign, union-attr]

    def on_predict_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if self.moment == "between" and trainer.global_rank == self.rank:
            self.kill()

    def kill(self, *_: Any, **__: Any) -> None:
        self.note.write_text(f"{time.time()}")
        os.kill(os.getpid(), self.sent)


class Slow(Callback):
    """Videos that only a request to stop keeps from taking `PATIENCE`, on one rank.

    Args:
        rank: Which.
    """

    def __init__(self, rank: int = 0) -> None:
        self.rank = rank

    def on_predict_start(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.global_rank != self.rank:
            return
        write = tokenflow.engine.lightning.run_writer.write_video

        def slowly(path: Path, frames: Any, *args: Any, **options: Any) -> Any:
            def some() -> Any:
                for index in range(len(frames)):
                    for _ in range(10 * PATIENCE // len(frames)):
                        time.sleep(0.1)
                        frames[index]
                    yield frames[index]

            return write(path, some(), *args, **options)

        tokenflow.engine.lightning.run_writer.write_video = slowly


class Impatient(Callback):
    """Has a process count as lost after 5 seconds, and who needs it end after 2 more."""

    def __init__(self) -> None:
        tokenflow.engine.ranks.channel.LOST, tokenflow.engine.ranks.channel.HOPELESS = 5, 2


class Noting(Callback):
    """Adds a line to a file for every step that the first rank takes, with the stage's name.

    Args:
        file: Where.
    """

    def __init__(self, file: str) -> None:
        self.file = Path(file)

    def on_predict_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, index: int, *_: Any
    ) -> None:
        if trainer.global_rank > 0 or index > 0:
            return
        before: Any = module.progress

        def progress(stage: str, step: int, steps: int) -> None:
            before(stage, step, steps)
            with self.file.open("a") as file:
                file.write(f"{stage}\n")

        module.progress = progress  # type: ignore[assignment]
