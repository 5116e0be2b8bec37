"""Metrics of finished runs: measured, written beside the video, during predict if asked for."""

from __future__ import annotations

import dataclasses
import json
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from tokenflow.diffusion import Backbone
from tokenflow.engine.finished_run import FinishedRun
from tokenflow.engine.folder import METRICS
from tokenflow.engine.job import ClipSource
from tokenflow.engine.module import TokenFlow
from tokenflow.engine.writer import shown, writer_of
from tokenflow.errors import InputError
from tokenflow.metrics import Measures, Motions
from tokenflow.video import Clip, atomic

Values = dict[str, float]


@torch.no_grad()
def round_trip(backbone: Backbone, source: ClipSource, batch: int = 4) -> Clip:
    """The source after the VAE alone, at the size of the run's videos: what no edit is better than.

    Raises:
        InputError: The source cannot be read.
    """
    clip = source.read(backbone.multiple)
    places = torch.arange(len(clip)).split(batch)
    frames = [backbone.decode(backbone.encode(clip.frames[some])).cpu() for some in places]
    back = dataclasses.replace(clip, frames=torch.cat(frames).clamp(0, 1), name="VAE round trip")
    return dataclasses.replace(back, frames=torch.stack(list(shown(back))))


class Sources:
    """The source of one run after the other; what was found out of the last one is kept."""

    def __init__(self, measures: Measures, backbone: Backbone | None = None) -> None:
        self.measures, self.backbone = measures, backbone
        self.last: tuple[Any, Motions, Values | None] | None = None

    def of(self, run: FinishedRun, clip: Clip) -> tuple[Motions, Values | None]:
        """A run's source with its flow, and the metrics of its round trip if there is a model."""
        key = run.source.path.resolve(), run.source.choice, clip.frames.shape
        if self.last is None or self.last[0] != key:
            motions, floor = self.measures.motions(clip), None
            if self.backbone is not None:
                back = round_trip(self.backbone, run.source)
                prompt = run.record["inversion_prompt"]
                floor = self.measures.of(back, motions, prompt, prompt)
            self.last = key, motions, floor
        return self.last[1], self.last[2]


def measure_run(
    run: FinishedRun, sources: Sources, mask: Bool[Tensor, "frames height width"] | None = None
) -> dict[str, Any]:
    """Measures a run and writes `metrics.json` into its folder; returns what that holds.

    Raises:
        InputError: Source and edit do not belong together, or a file cannot be read or written.
    """
    source, edited = run.clips()
    measures, prompts = sources.measures, (run.record["prompt"], run.record["inversion_prompt"])
    motions, floor = sources.of(run, source)
    found = {
        "metrics": measures.of(edited, motions, *prompts, mask),
        "round_trip": floor,
        "source": str(run.source.path),
        "frames": len(edited),
        "size": list(edited.frames.shape[-2:]),
        "options": measures.described,
        "tokenflow": version("tokenflow"),
    }
    try:
        with atomic(run.folder / METRICS) as file:
            file.write_text(json.dumps(found, indent=2, allow_nan=False) + "\n")
    except OSError as error:
        raise InputError(f"{run.folder / METRICS} cannot be written: {error}") from error
    return found


class Measuring(Callback):
    """Leaves `metrics.json` in a run's folder, as `tokenflow evaluate` does, whose options it has.

    A run that cannot be measured stays as it is, with a warning.

    Args:
        measure: Whether to.
        round_trip: Also measure the source after the VAE alone.
        options: What is measured.
    """

    def __init__(self, measure: bool = False, round_trip: bool = False, **options: Any) -> None:
        self.measure, self.round_trip = measure, round_trip
        self.options = options  # on a line of its own, where jsonargparse finds it

    def on_predict_start(self, trainer: Trainer, module: TokenFlow) -> None:  # type: ignore[override]
        with module.everyone.together():
            if self.measure and module.group.rank == 0:
                measures = Measures(**self.options)
                sources = Sources(measures, module.backbone if self.round_trip else None)
                writer_of(trainer).measure = partial(leave, sources)


def leave(sources: Sources, folder: Path, record: dict[str, Any]) -> None:
    """Measures a run whose videos are written."""
    try:
        measure_run(FinishedRun.of(folder, record), sources)
    except Exception as error:  # whatever it is, the videos are there
        why = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        print(f"{folder} is not measured: {why}{error}", file=sys.stderr)
