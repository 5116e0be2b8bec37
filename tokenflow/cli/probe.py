"""Samples a run's clip again, from its record, up to one step, and probes one site."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from tempfile import TemporaryDirectory
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor

from tokenflow.cli.predict import run as predict
from tokenflow.engine.lightning.callback import EditCallback
from tokenflow.engine.lightning.job import Job
from tokenflow.engine.lightning.module import TokenFlowModule
from tokenflow.engine.probe import Probe
from tokenflow.engine.settings import Settings
from tokenflow.errors import InputError
from tokenflow.propagation import Correspondence, Window
from tokenflow.runs.files import RECORD
from tokenflow.runs.observed import Observed
from tokenflow.runs.record import Run

ALONE = [
    "--trainer.devices=1", "--trainer.num_nodes=1", "--trainer.strategy=auto",
    "--model.ranks_per_clip=null", "--model.save_every=null", "--trainer.logger=false",
    "--metrics.measure=false",
]  # fmt: skip


class Enough(BaseException):
    """Ends a sampling that has shown what it should; no failure of a clip."""


class Probing(EditCallback):
    """Probes one clip's sampling, and ends it after that step.

    Args:
        run: Whose clip.
        asked: The site, step and frame of the probe.
    """

    def __init__(self, run: Run, asked: Sequence[Any]) -> None:
        self.run, self.asked = run, asked
        self.probe: Probe | None = None

    def admit(self, trainer: Trainer, module: TokenFlowModule, job: Job) -> str | None:  # type: ignore[override]
        settings = module.options(job)[1]
        if settings.consistency != "tokenflow":
            raise InputError(
                f"{self.run.folder} has no correspondences: its consistency is "
                f"{settings.consistency!r}, expected 'tokenflow'"
            )
        self.made(module, range(0), settings)  # refuses a wrong step or site at once
        return None

    def made(self, module: TokenFlowModule, frames: range, settings: Settings) -> Probe:
        """A probe of a clip's frames."""
        assert module.backbone is not None, "setup comes before a clip"
        return Probe(module.backbone.sites(), frames, settings.steps, *self.asked)

    def on_edit_start(  # type: ignore[override]
        self, trainer: Trainer, module: TokenFlowModule, job: Job, frames: range
    ) -> None:
        self.probe = self.made(module, frames, module.options(job)[1])

    def wants_correspondences(self, step: int) -> bool:
        return self.probe is not None and self.probe.wants(step)

    def on_correspondence(self, source: Tensor, window: Window, found: Correspondence) -> None:
        if self.probe is not None:
            self.probe(source, window, found)

    def on_edit_step(self, *_: Any) -> None:
        if self.probe is not None and self.probe.seen is not None:
            raise Enough


def observe(
    run: Run,
    site: str | None = None,
    step: int | None = None,
    frame: int | None = None,
    words: list[str] | None = None,
) -> Observed:
    """What a site of a run's model sees at a step; its clip is inverted and sampled for it.

    Args:
        run: A run whose consistency is "tokenflow".
        site: As of `Probe`.
        step: As of `Probe`.
        frame: As of `Probe`.
        words: Further options, as of `tokenflow predict`.

    Raises:
        InputError: The run cannot be repeated, or has no such site or step.
    """
    if (run.record.get("data") or {}).get("manifest"):
        raise InputError(
            f"{run.folder / RECORD} is of an earlier version, and names a manifest in place of the "
            f"clip; edit the clip again"
        )
    probing = Probing(run, (site, step, frame))
    options = ["--config", str(run.folder / RECORD), *ALONE, *(words or [])]
    with suppress(Enough), TemporaryDirectory() as elsewhere:  # the run's folder is finished
        predict([*options, f"--output.folder={elsewhere}"], [probing])
    assert probing.probe is not None, "an edit has begun"
    assert probing.probe.seen is not None, "it has ended by `Enough`"
    return probing.probe.seen
