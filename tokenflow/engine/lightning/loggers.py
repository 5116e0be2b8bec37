"""What a run leaves, for the loggers that the user has configured."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from PIL import Image
from torch import Tensor

from tokenflow.engine.lightning.job import Job
from tokenflow.engine.lightning.module import Prediction, TokenFlowModule
from tokenflow.engine.lightning.run_writer import writer_of
from tokenflow.report import read_run
from tokenflow.runs.files import EDITED, SHEET
from tokenflow.text import printable, printable_lines
from tokenflow.video import Frames, levels, read_clip

SHOWN = 64
"""Frames of an animation, which has no more."""


class Logged(Callback):
    """Gives every logger a finished run's numbers, and those that can show them its pictures.

    The clips that other groups of ranks edit are not logged: loggers belong to the first process.
    A logger that fails is reported and removed; the others and the job continue.
    """

    def on_predict_batch_end(  # type: ignore[override]
        self, trainer: Trainer, module: TokenFlowModule, prediction: Any, job: Job, *_: Any
    ) -> None:
        if not isinstance(prediction, Prediction) or not trainer.is_global_zero:
            return
        writer = writer_of(trainer)
        folder = writer.folder / job.name
        for logger in trainer.loggers if writer.outcomes[-1].status == "done" else []:
            try:
                log_run(logger, printable(job.name), folder)
            except Exception as error:  # whatever it is, the videos are there
                by, why = type(logger).__name__, f"{type(error).__name__}: {error}"
                said = f"from {folder} on nothing is logged by {by}: {why}"
                print(printable_lines(said), file=sys.stderr)
                trainer.loggers = [other for other in trainer.loggers if other is not logger]


def log_run(logger: Logger, name: str, folder: Path) -> None:
    """Logs a run's numbers by any logger; sheet and video by TensorBoard, W&B and MLflow."""
    logger.log_metrics({f"{name}/{key}": value for key, value in numbers(folder).items()})
    sheet, edited = folder / SHEET, folder / EDITED
    if isinstance(logger, TensorBoardLogger):
        writer: Any = logger.experiment
        picture = np.asarray(Image.open(sheet).convert("RGB"))
        writer.add_image(f"{name}/frames", picture, dataformats="HWC")
        add_animation(writer, f"{name}/edited", edited)
    elif isinstance(logger, WandbLogger):
        logger.log_image(f"{name}/frames", [str(sheet)])
        logger.log_video(f"{name}/edited", [str(edited)])
    elif isinstance(logger, MLFlowLogger):
        for path in (sheet, edited):
            logger.experiment.log_artifact(logger.run_id, str(path), name)
    logger.save()


def numbers(folder: Path) -> dict[str, float]:
    """A run's metrics, where they have been measured, and the seconds of its stages."""
    run = read_run(folder)
    known = {name: value for name, value in run.metrics.items() if value is not None}
    return {f"seconds/{stage}": float(value) for stage, value in run.seconds.items()} | known


def add_animation(writer: Any, tag: str, path: Path) -> None:
    """Adds a video to TensorBoard as a GIF, which is all that it shows; of a long one every n-th.

    `SummaryWriter.add_video` does the same, but needs a video editor for it.
    """
    from tensorboard.compat.proto.summary_pb2 import Summary

    clip = read_clip(path, in_memory=False)
    stride = -(-len(clip) // SHOWN)
    height, width = clip.frames.shape[-2:]
    data = gif(clip.frames[::stride], 1000 * stride / float(clip.rate))
    picture = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=data)
    writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=picture)]))


def gif(frames: Float[Tensor, "frames 3 height width"] | Frames, duration: float) -> bytes:
    """An endless GIF, each frame shown for so many milliseconds."""
    first, *rest = (Image.fromarray(levels(x).permute(1, 2, 0).numpy()) for x in frames)
    file = io.BytesIO()
    first.save(file, "GIF", save_all=True, append_images=rest, duration=duration, loop=0)
    return file.getvalue()
