"""The LightningDataModule: the clips of a run, each read when its turn comes."""

from __future__ import annotations

import sys
from typing import Literal

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from tokenflow.engine.lightning.job import ClipSource, Job
from tokenflow.engine.lightning.manifest import part_of, read_manifest
from tokenflow.errors import InputError
from tokenflow.storage.paths import local
from tokenflow.text import printable


class Video(LightningDataModule):
    """One video file or folder of images, or the clips that a manifest lists.

    Args:
        video: A video file, or a folder of images in the order of their names.
        manifest: A YAML or CSV file with a clip in each row: video, prompt, mask, and any option of
            the frames, the edit, the editor and the kernel that is the clip's own; a grid of values
            makes a sweep. Clips that are finished are skipped, and one that fails does not stop the
            others.
        root: The folder that a manifest's files lie in; the manifest's if not given.
        part: "3/16" takes the third of sixteen parts of the manifest's clips.
        start: First frame.
        stop: Frame to stop before; the clip's end when not given. One past the end is an error,
            unless max_frames ends earlier.
        stride: Take every so manieth frame.
        max_frames: At most so many frames.
        resolution: Pixels of the shorter side; the source's when not given.
        fit: How frames come to a multiple of what the model needs: "resize" stretches them
            slightly, and the output back; "crop" cuts what is too much.
        image_rate: Frames per second of a folder of images, from 0.0001 to 1000.
    """

    allow_zero_length_dataloader_with_multiple_devices = True

    def __init__(
        self,
        video: str | None = None,
        manifest: str | None = None,
        root: str | None = None,
        part: str = "1/1",
        start: int = 0,
        stop: int | None = None,
        stride: int = 1,
        max_frames: int | None = None,
        resolution: int | None = None,
        fit: Literal["resize", "crop"] = "resize",
        image_rate: float = 8.0,
    ) -> None:
        super().__init__()
        choice = dict(
            start=start,
            stop=stop,
            stride=stride,
            max_frames=max_frames,
            resolution=resolution,
            fit=fit,
            image_rate=image_rate,
        )
        if (video is None) == (manifest is None):
            raise InputError(
                "expected --data.video, or --data.manifest for many, got "
                + ("neither" if video is None else "both")
            )
        if manifest is not None:
            listed = read_manifest(local(manifest), local(root) if root else None, choice)
            self.jobs = part_of(listed, part)
            self.none = f"part {part} of the {len(listed)} clips of {manifest} has none"
        elif root is not None or part != "1/1":
            raise InputError(
                "--data.root and --data.part are of the clips of --data.manifest, and there is "
                "none; leave them out"
            )
        else:
            self.jobs = [Job(ClipSource(local(str(video)), **choice))]

    def setup(self, stage: str) -> None:
        if not self.jobs and self.trainer is not None and self.trainer.is_global_zero:
            print(printable(self.none), file=sys.stderr)

    def predict_dataloader(self) -> DataLoader[Job]:
        return DataLoader(self.jobs, batch_size=None)  # type: ignore[arg-type]
