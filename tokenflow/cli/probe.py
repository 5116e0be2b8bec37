"""Samples a run's clip again, as its record says, up to one step, and watches one site."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback

from tokenflow.cli.predict import run as predict
from tokenflow.engine.lightning.job import Job
from tokenflow.engine.lightning.module import TokenFlow
from tokenflow.engine.probe import Observer
from tokenflow.errors import InputError
from tokenflow.runs.files import RECORD
from tokenflow.runs.observed import Observed
from tokenflow.runs.record import Run

ALONE = [
    "--trainer.devices=1", "--trainer.num_nodes=1", "--trainer.strategy=auto",
    "--model.ranks_per_clip=null", "--trainer.logger=false", "--metrics.measure=false",
]  # fmt: skip


class Enough(BaseException):
    """Ends a sampling that has shown what it should; no failure of a clip."""


class Probe(Callback):
    """Lets one clip's sampling be watched, and ends it after the step that was asked for.

    Args:
        run: Whose clip.
        observer: Who watches.
    """

    def __init__(self, run: Run, observer: Observer) -> None:
        self.run, self.observer = run, observer

    def on_predict_batch_start(  # type: ignore[override]
        self, trainer: Trainer, module: TokenFlow, job: Job, *_: Any
    ) -> None:
        asked = job.where is None or (
            job.name == self.run.name and job.source.record == self.run.came.get("source")
        )
        module.admit = lambda job: None if asked else "not asked for"
        if not asked:
            return
        job.where = None  # an error ends the command, and is no note in the run's folder
        settings = module.options(job)[1]
        if settings.consistency != "tokenflow":
            raise InputError(
                f"{self.run.folder} has no correspondences: its consistency is "
                f"{settings.consistency!r}, expected 'tokenflow'"
            )
        assert module.backbone is not None, "setup comes before a clip"
        # refuses a wrong step or site before the clip is inverted
        self.observer.during(0, settings.steps, range(0), module.backbone.unet)
        module.observer = lambda: self.observer
        module.described = (None, None)  # inversions are recalled, samplings are not
        before = module.progress

        def progress(stage: str, done: int, steps: int) -> None:
            before(stage, done, steps)
            if self.observer.seen is not None:
                raise Enough

        module.progress = progress


def observe(run: Run, observer: Observer, words: list[str] | None = None) -> Observed:
    """What a site of a run's model sees at a step; its clip is inverted and sampled for it.

    Args:
        run: A run whose consistency is "tokenflow".
        observer: Of which site and step.
        words: Further options, as of `tokenflow predict`.

    Raises:
        InputError: The run cannot be repeated, or has no such site or step.
    """
    probe = Probe(run, observer)
    options = ["--config", str(run.folder / RECORD), *ALONE, *(words or [])]
    with suppress(Enough):
        predict(options, [probe])
    if observer.seen is None:
        raise InputError(
            f"{run.folder / RECORD} lists no clip {run.name!r} any more, or other frames; expected "
            f"the folder to have its clip's name, and the manifest to be as it was"
        )
    return observer.seen
