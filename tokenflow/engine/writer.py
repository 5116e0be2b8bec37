"""The prediction writer: a run's folder, whole or not at all."""

from __future__ import annotations

import platform
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
import yaml
from jaxtyping import Float
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from tokenflow.engine.data import ClipSource
from tokenflow.engine.frame_group import FrameGroup
from tokenflow.engine.module import Prediction
from tokenflow.errors import InputError
from tokenflow.video import (
    Clip,
    atomic,
    contact_sheet,
    resized,
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
        if not 0 <= crf <= 51:
            raise InputError(f"crf is x264's quality from 0 to 51, got {crf}")
        self.folder, self.overwrite, self.crf = Path(folder), overwrite, crf
        self.configuration: dict[str, Any] = {}

    def on_predict_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: ClipSource, *_: Any
    ) -> None:
        """Refuses before the work is done, not after."""
        with FrameGroup.of_all_ranks(module.device).together():
            if trainer.is_global_zero:
                self.check(batch)

    def check(self, source: ClipSource) -> None:
        """Raises `InputError` where a clip's files may not or cannot be written."""
        folder = self.folder / source.name
        if (folder / "run.yaml").exists() and not self.overwrite:
            raise InputError(
                f"{folder} holds a finished run; choose another --output.folder, or give "
                f"--output.overwrite true to replace it"
            )
        if folder.resolve() in (source.path.resolve(), source.path.resolve().parent):
            raise InputError(
                f"the output would lie beside or in its source {source.path}; choose another "
                f"--output.folder"
            )
        try:
            # no folder is made before there is something to put in it
            nearest = next(place for place in (folder, *folder.parents) if place.exists())
            with TemporaryFile(dir=nearest):
                pass
        except OSError as error:
            raise InputError(
                f"{folder} cannot be written ({error}); choose another --output.folder"
            ) from error

    def write_on_batch_end(
        self,
        trainer: Trainer,
        module: LightningModule,
        prediction: Prediction,
        indices: Any,
        batch: ClipSource,
        *_: Any,
    ) -> None:
        with FrameGroup.of_all_ranks(module.device).together():
            if trainer.is_global_zero:
                self.write(prediction, self.folder / batch.name)

    def write(self, prediction: Prediction, folder: Path) -> None:
        """Writes a run's files; `run.yaml`, the last, says that it is whole."""
        result = prediction.result
        source, edited = result.source, result.clip
        (folder / "run.yaml").unlink(missing_ok=True)
        try:
            write_clip(folder / "edited.mp4", edited, crf=self.crf)
            rows = [shown(source), shown(edited)]
            both = side_by_side(*rows)
            write_video(folder / "compare.mp4", both, source.times, source.rate, crf=self.crf)
            write_image(folder / "contact_sheet.png", contact_sheet(rows))
            with atomic(folder / "run.yaml") as file:
                file.write_text(yaml.safe_dump(self.summary(prediction), sort_keys=False))
        finally:
            with suppress(OSError):
                folder.rmdir()  # only an empty one
        for name in ("edited.mp4", "compare.mp4", "contact_sheet.png", "run.yaml"):
            print(folder / name)

    def summary(self, prediction: Prediction) -> dict[str, Any]:
        """What `run.yaml` holds: the configuration, and under `run` what came of it."""
        result = prediction.result
        quality = {
            name: round(value, 2)
            for name in ("reconstruction_psnr", "round_trip_psnr")
            if (value := getattr(result, name)) is not None
        }
        record = {
            "seed": result.seed,
            "frames": len(result.clip),
            **prediction.resolved,
            "seconds": result.seconds,
            **quality,
            "versions": {"python": platform.python_version()}
            | {name: version(name) for name in PACKAGES},
        }
        return {**self.configuration, "run": record}


def shown(clip: Clip) -> Float[Tensor, "frames 3 height width"]:
    """A clip's frames at the size that its videos have."""
    return torch.stack([resized(frame, clip.display_size) for frame in clip.frames])
