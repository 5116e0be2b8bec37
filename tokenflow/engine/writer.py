"""The prediction writer: a run's folder, whole or not at all."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from tokenflow.engine.data import Source
from tokenflow.engine.editing import Result
from tokenflow.engine.module import Prediction
from tokenflow.errors import InputError
from tokenflow.video import (
    atomic,
    contact_sheet,
    side_by_side,
    write_clip,
    write_image,
    write_video,
)

PACKAGES = ("tokenflow", "torch", "lightning", "diffusers", "transformers", "av")


class RunWriter(BasePredictionWriter):
    """Writes `edited.mp4`, `compare.mp4`, `contact_sheet.png` and, last, `run.yaml`.

    Args:
        folder: The run's files go to a folder of the clip's name in this one.
        overwrite: Replace the files of a finished run instead of refusing.
        crf: x264's quality of the videos: 0 is lossless, 51 worst.
    """

    def __init__(self, folder: str = "runs", overwrite: bool = False, crf: int = 16) -> None:
        super().__init__(write_interval="batch")
        self.folder, self.overwrite, self.crf = Path(folder), overwrite, crf
        self.configuration: dict[str, Any] = {}

    def on_predict_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Source, *_: Any
    ) -> None:
        """Refuses before the work is done, not after."""
        folder = self.folder / batch.name
        if (folder / "run.yaml").exists() and not self.overwrite:
            raise InputError(
                f"{folder} holds a finished run; choose another --output.folder, or give "
                f"--output.overwrite true to replace it"
            )

    def write_on_batch_end(
        self,
        trainer: Trainer,
        module: LightningModule,
        prediction: Prediction,
        indices: Any,
        batch: Source,
        *_: Any,
    ) -> None:
        folder = self.folder / batch.name
        result = prediction.result
        source, edited = result.source, result.clip
        (folder / "run.yaml").unlink(missing_ok=True)
        write_clip(folder / "edited.mp4", edited, crf=self.crf)
        both = side_by_side(source.frames, edited.frames)
        write_video(folder / "compare.mp4", both, source.times, source.rate, crf=self.crf)
        write_image(folder / "contact_sheet.png", contact_sheet([source.frames, edited.frames]))
        with atomic(folder / "run.yaml") as file:
            file.write_text(yaml.safe_dump(self.summary(result), sort_keys=False))
        for name in ("edited.mp4", "compare.mp4", "contact_sheet.png", "run.yaml"):
            print(folder / name)

    def summary(self, result: Result) -> dict[str, Any]:
        """What `run.yaml` holds: how to repeat the run, and what it took."""
        quality = {
            name: round(value, 2)
            for name in ("reconstruction_psnr", "round_trip_psnr")
            if (value := getattr(result, name)) is not None
        }
        return {
            "configuration": self.configuration,
            "seed": result.seed,
            "frames": len(result.clip),
            "seconds": result.seconds,
            **quality,
            "versions": {"python": platform.python_version()}
            | {name: version(name) for name in PACKAGES},
        }
