"""The LightningDataModule: the clips of a run, each read when its turn comes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from tokenflow.video import Clip, VideoError, clip_name, read_clip


class Video(LightningDataModule):
    """One video file or folder of images.

    Args:
        video: A video file, or a folder of images in the order of their names.
        start: First frame.
        stop: Frame to stop before; the clip's end when not given. One past the end is an error,
            unless max_frames ends earlier.
        stride: Take every so manieth frame.
        max_frames: At most so many frames.
        resolution: Pixels of the shorter side; the source's when not given.
        fit: How frames come to a multiple of what the model needs: "resize" stretches them
            slightly, and the output back; "crop" cuts what is too much.
        image_rate: Frames per second of a folder of images, from 0.0001 to 10000.
    """

    def __init__(
        self,
        video: str,
        start: int = 0,
        stop: int | None = None,
        stride: int = 1,
        max_frames: int | None = None,
        resolution: int | None = None,
        fit: Literal["resize", "crop"] = "resize",
        image_rate: float = 8.0,
    ) -> None:
        super().__init__()
        self.source = ClipSource(
            Path(video),
            start=start,
            stop=stop,
            stride=stride,
            max_frames=max_frames,
            resolution=resolution,
            fit=fit,
            image_rate=image_rate,
        )

    def setup(self, stage: str) -> None:
        if not self.source.path.exists():  # before the model is loaded
            raise VideoError(
                f"{self.source.path} does not exist; expected a video file or a folder of images"
            )

    def predict_dataloader(self) -> DataLoader[ClipSource]:
        return DataLoader([self.source], batch_size=None)  # type: ignore[arg-type]


class ClipSource:
    """Where a clip comes from: what a batch is, so that frames are read only when needed."""

    def __init__(self, path: Path, **choice: Any) -> None:
        self.path, self.choice = path, choice

    @property
    def name(self) -> str:
        """The clip's name."""
        return clip_name(self.path)

    def read(self, multiple: int, part: Callable[[int], range] | None = None) -> Clip:
        """The clip, or the part of it that `part` chooses by the number of frames.

        The sides are multiples of `multiple` pixels.
        """
        return read_clip(self.path, multiple=multiple, part=part, **self.choice)
