"""Reports a run's progress: which clip, which stage, which step, and the ETA."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer

from tokenflow.engine.lightning.callback import EditCallback
from tokenflow.engine.lightning.job import Job
from tokenflow.engine.lightning.module import TokenFlowModule
from tokenflow.engine.progress import Reporter
from tokenflow.engine.settings import Settings


class StageProgress(EditCallback):
    """Reports the clips of a manifest and the stages of each, on rank 0 alone.

    While a clip is inverted, the ETA includes its edit, by the number of the network's passes.

    Args:
        interval: Seconds between two lines, where there is no terminal.
    """

    def __init__(self, interval: float = 15.0) -> None:
        self.interval = interval
        self.reporter: Reporter | None = None
        self.index = 0
        self.edit_share = 0.0  # how many times as long as inversion the edit takes

    def on_predict_start(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.is_global_zero:
            self.reporter = Reporter(self.interval)
            self.reporter.bars.start()

    def on_predict_batch_start(  # type: ignore[override]
        self, trainer: Trainer, module: TokenFlowModule, job: Job, index: int, *_: Any
    ) -> None:
        self.index, self.edit_share = index, edit_to_inversion(module.options(job)[1])

    def on_edit_start(
        self, trainer: Trainer, module: LightningModule, job: Job, frames: range
    ) -> None:
        if self.reporter is not None:
            self.reporter.forget("clip")
            if job.where is not None:
                clips = len(trainer.datamodule.jobs)  # type: ignore[attr-defined]
                self.reporter.item("clip", job.name, self.index + 1, clips)

    def on_edit_step(
        self, trainer: Trainer, module: LightningModule, stage: str, step: int, steps: int
    ) -> None:
        if self.reporter is None:
            return
        if stage == "cached":  # these frames are edited, and not inverted
            self.edit_share *= steps / max(steps - step, 1)
        more = self.edit_share * steps if stage == "invert" else 0.0
        self.reporter.step(stage, step, steps, more)

    def on_predict_end(self, trainer: Trainer, module: LightningModule) -> None:
        if self.reporter is not None:
            self.reporter.complete("clip")
        self.stop()

    def on_exception(self, *_: Any) -> None:
        self.stop()

    def stop(self) -> None:
        """Leaves the terminal as it was."""
        if self.reporter is not None:
            self.reporter.bars.stop()


def edit_to_inversion(settings: Settings) -> float:
    """The edit's passes of the network over the inversion's, for each frame.

    Three branches at every step, two where guidance is off, of the frame and of its part of the
    keyframes.
    """
    branches = 2 + settings.guidance_end - settings.guidance_begin
    keyframes = 1 / settings.keyframe_every if settings.consistency == "tokenflow" else 0.0
    return (
        branches * (1 + keyframes) * settings.steps / (settings.inversion_steps or settings.steps)
    )
