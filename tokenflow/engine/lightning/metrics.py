"""Metrics of finished runs, and of each run of predict with `--metrics.measure true`."""

from __future__ import annotations

import dataclasses
import json
import sys
from copy import copy
from importlib.metadata import version
from typing import Any

import torch
from jaxtyping import Bool
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from tokenflow.diffusion import Backbone
from tokenflow.engine.lightning.callback import EditCallback
from tokenflow.engine.lightning.finished_run import FinishedRun
from tokenflow.engine.lightning.job import ClipSource
from tokenflow.engine.lightning.mask import cut_mask, require_one_clip
from tokenflow.engine.lightning.module import TokenFlowModule
from tokenflow.engine.lightning.run_writer import shown
from tokenflow.engine.region import AUTO, white
from tokenflow.errors import InputError
from tokenflow.metrics import Measures
from tokenflow.propagation import ClipFlow
from tokenflow.report import Run
from tokenflow.runs.files import MASK, METRICS
from tokenflow.storage.atomic import atomic
from tokenflow.storage.scratch import empty_or_memmap
from tokenflow.text import printable_lines
from tokenflow.video import Clip, resized

Values = dict[str, float]
Mask = Bool[Tensor, "frames height width"]


@torch.no_grad()
def round_trip(
    backbone: Backbone,
    source: ClipSource,
    like: Clip,
    batch: int = 4,
) -> Clip:
    """The source after the VAE alone, at the size of `like`: what no edit is better than.

    Raises:
        InputError: The source cannot be read.
    """
    clip = source.read(backbone.multiple)
    height, width = like.frames.shape[-2:]
    images = empty_or_memmap(len(clip), 3, height, width)
    for some in torch.arange(len(clip)).split(batch):
        back = backbone.decode(backbone.encode(clip.frames[some])).cpu().clamp(0, 1)
        for number, image in zip(some.tolist(), back, strict=True):
            images[number] = resized(image, (height, width))
    return dataclasses.replace(clip, frames=images, name="VAE round trip")


class Sources:
    """The source of one run after the other; what was found out of the last one is kept.

    Args:
        measures: What is measured.
        backbone: A model whose VAE's round trip of each source is measured, too.
        mask: A video or folder of images, white where the object is that was to be edited; each
            run's own, where its record names one or its folder has one, if not given.
    """

    def __init__(
        self, measures: Measures, backbone: Backbone | None = None, mask: str | None = None
    ) -> None:
        self.measures, self.backbone = measures, backbone
        self.mask = mask
        self.last: tuple[Any, ClipFlow, Values | None, Mask | None] | None = None

    def mask_of(self, run: FinishedRun) -> str | None:
        """The path of a run's mask, "auto" for the one in its folder."""
        if self.mask is not None:
            return self.mask
        own = run.record.get("mask")
        found = AUTO if (run.place / MASK).exists() else None
        return own if isinstance(own, str) else found

    def of(self, run: FinishedRun, clip: Clip) -> tuple[ClipFlow, Values | None, Mask | None]:
        """A run's source with its flow, the metrics of its round trip if there is a model, and its
        mask.
        """
        prompt, mask = run.record["inversion_prompt"], self.mask_of(run)
        mask = str(run.place / MASK) if mask == AUTO else mask
        key = run.source.path.resolve(), run.source.choice, clip.frames.shape, prompt, mask
        if self.last is None or self.last[0] != key:
            motions, floor = self.measures.motions(clip), None
            hidden = None
            if mask is not None:
                cut = cut_mask(mask, run.source, run.record["multiple"], like=clip)
                hidden = white(shown(cut))
            if self.backbone is not None:
                back = round_trip(self.backbone, run.source, like=clip)
                floor = self.measures.of(back, motions, prompt, prompt, hidden)
            self.last = key, motions, floor, hidden
        return self.last[1:]


def measure_run(run: FinishedRun, sources: Sources) -> dict[str, Any]:
    """Measures a run and writes `metrics.json` into its folder; returns what that holds.

    Raises:
        InputError: Source and edit do not belong together, or a file cannot be read or written.
    """
    source, edited = run.clips()
    measures, prompts = sources.measures, (run.record["prompt"], run.record["inversion_prompt"])
    motions, floor, hidden = sources.of(run, source)
    found = {
        "metrics": measures.of(edited, motions, *prompts, hidden),
        "round_trip": floor,
        "source": str(run.source.path),
        "frames": len(edited),
        "size": list(edited.frames.shape[-2:]),
        "options": measures.described | {"mask": sources.mask_of(run)},
        "tokenflow": version("tokenflow"),
    }
    try:
        with atomic(run.place / METRICS) as file:
            file.write_text(json.dumps(found, indent=2, allow_nan=False) + "\n")
    except OSError as error:
        raise InputError(f"{run.folder / METRICS} cannot be written: {error}") from error
    return found


class Measuring(EditCallback):
    """Leaves `metrics.json` in a run's folder, as `tokenflow evaluate` does, whose options it has.

    A run that cannot be measured stays as it is, with a warning.

    Args:
        measure: Whether to.
        round_trip: Also measure the source after the VAE alone.
        mask: A video or folder of images, white where the object is that is to be edited, of the
            source's length or the edit's; of one clip, so not with a manifest, whose rows have
            their own.
        options: What is measured.
    """

    def __init__(
        self,
        measure: bool = False,
        round_trip: bool = False,
        mask: str | None = None,
        **options: Any,
    ) -> None:
        self.measure, self.round_trip, self.mask = measure, round_trip, mask
        self.options = options  # on a line of its own, where jsonargparse finds it
        self.sources: Sources | None = None

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        """Raises `InputError` for one mask and many clips, before the model is loaded."""
        if not self.measure or self.mask is None:
            return
        require_one_clip(trainer, "metrics.mask", self.mask)

    def on_predict_start(self, trainer: Trainer, module: TokenFlowModule) -> None:  # type: ignore[override]
        with module.everyone.together():
            if self.measure and module.group.rank == 0:
                backbone = module.backbone if self.round_trip else None
                # each run's mask is in its record
                self.sources = Sources(Measures(**self.options), backbone)

    def on_run_staged(self, trainer: Trainer, module: LightningModule, run: Run) -> None:
        if self.sources is not None:
            # a copy: a clip's frames and flow are not kept while the next one is edited
            leave(copy(self.sources), run)


def leave(sources: Sources, run: Run) -> None:
    """Measures a run whose videos are written."""
    try:
        measure_run(FinishedRun.of(run), sources)
    except Exception as error:  # whatever it is, the videos are there
        why = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        said = f"{run.folder} is not measured: {why}{error}"
        print(printable_lines(said), file=sys.stderr)
