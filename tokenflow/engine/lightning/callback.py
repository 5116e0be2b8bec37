"""What Lightning's callbacks can also see of an edit."""

from __future__ import annotations

from typing import Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from tokenflow.engine.lightning.job import Job
from tokenflow.propagation import Correspondence, Window
from tokenflow.runs.record import Run


class EditCallback(Callback):
    """A callback with the hooks of an edit besides Lightning's own; by default they do nothing."""

    def admit(self, trainer: Trainer, module: LightningModule, job: Job) -> str | None:
        """Why a clip is not to be edited, if there is a reason; asked on rank 0 of its group.

        Raises:
            InputError: It cannot be, by the user's fault.
        """
        return None

    def on_edit_start(
        self, trainer: Trainer, module: LightningModule, job: Job, frames: range
    ) -> None:
        """Called before a clip is edited, with the frames that this rank edits."""

    def on_edit_step(
        self, trainer: Trainer, module: LightningModule, stage: str, step: int, steps: int
    ) -> Literal["stop"] | None:
        """Called after every step of a stage; "stop" ends the run where it can be resumed."""
        return None

    def on_prediction(
        self, trainer: Trainer, module: LightningModule, done: int, clean: Tensor
    ) -> None:
        """Called after a step of sampling with the clean latents that it predicts.

        They are of this rank's frames (frames, channels, height, width), in host memory.
        """

    def on_correspondence(self, source: Tensor, window: Window, found: Correspondence) -> None:
        """Called with every correspondence of a step that it wants, and the window's tokens."""

    def wants_correspondences(self, step: int) -> bool:
        """Whether a step's are wanted; by default all are, by who has `on_correspondence`.

        The source's branch then runs, though what an edit takes from it may be cached.
        """
        return type(self).on_correspondence is not EditCallback.on_correspondence

    def on_run_staged(self, trainer: Trainer, module: LightningModule, run: Run) -> None:
        """Called when a run's videos are written, and before its page is."""


def edit_callbacks(trainer: Trainer) -> list[EditCallback]:
    """A trainer's callbacks that have the hooks of an edit."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, EditCallback)]


def wants_predictions(trainer: Trainer) -> bool:
    """Whether any of a trainer's callbacks looks at predicted clean latents."""
    return any(
        type(one).on_prediction is not EditCallback.on_prediction for one in edit_callbacks(trainer)
    )
