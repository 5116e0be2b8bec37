"""Samples a run's clip again, as its record says, up to one step, and watches one site."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from tokenflow.engine.attention import self_attention_sites
from tokenflow.engine.folder import RECORD
from tokenflow.engine.job import Job
from tokenflow.engine.module import TokenFlow
from tokenflow.errors import InputError
from tokenflow.prediction import run as predict
from tokenflow.propagation import Correspondence, Propagation, Window
from tokenflow.report.features import Observed
from tokenflow.report.run import Run

SHOWN = 8
"""Frames whose tokens are kept."""
ALONE = [
    "--trainer.devices=1", "--trainer.num_nodes=1", "--trainer.strategy=auto",
    "--model.ranks_per_clip=null",
]  # fmt: skip


class Enough(BaseException):
    """Ends a sampling that has shown what it should; no failure of a clip."""


class Watching(Propagation):
    """Another kernel, and what it was given and answered while `here`."""

    def __init__(self, kernel: Propagation, frames: list[int]) -> None:
        self.kernel, self.flow, self.frames = kernel, kernel.flow, frames
        self.here = False
        self.tokens: dict[int, Tensor] = {}
        self.parts: list[tuple[Window, Correspondence]] = []

    def correspond(self, source: Tensor, keys: Tensor, window: Window) -> Correspondence:
        found = self.kernel.correspond(source, keys, window)
        if self.here:
            self.parts.append((window, found))
            for frame, tokens in zip(window.frames, source.cpu(), strict=True):
                if frame in self.frames:
                    self.tokens[frame] = tokens.unflatten(0, (window.height, window.width))
        return found

    def during(self, here: bool) -> None:
        """Whether the site is at work that is watched."""
        self.here = here


class Probe(Callback):
    """Watches one clip's sampling, and ends it after the step that was asked for.

    Args:
        run: Whose clip.
        site: A self-attention layer; in the middle of the decoder if not given.
        step: Of sampling, from 0; the middle one if not given.
    """

    def __init__(self, run: Run, site: str | None = None, step: int | None = None) -> None:
        self.run, self.site, self.step = run, site, step
        self.seen: Observed | None = None

    def on_predict_batch_start(  # type: ignore[override]
        self, trainer: Trainer, module: TokenFlow, job: Job, *_: Any
    ) -> None:
        asked = job.where is None or job.name == self.run.name
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
        if module.backbone is None:
            raise RuntimeError("setup comes before the first batch")
        site = chosen(self_attention_sites(module.backbone.unet), self.site)
        count = int(self.run.came["frames"])
        frames = torch.linspace(0, count - 1, min(count, SHOWN)).round().long().tolist()
        watching = Watching(module.propagation, frames)
        layer = module.backbone.unet.get_submodule(site.removesuffix(".processor"))
        layer.register_forward_pre_hook(lambda *_: watching.during(True))
        layer.register_forward_hook(lambda *_: watching.during(False))
        module.propagation = watching
        module.described = (None, None)  # inversions are recalled, samplings are not
        before = module.progress

        def progress(stage: str, done: int, steps: int) -> None:
            before(stage, done, steps)
            if stage != "edit":
                return
            step = steps // 2 if self.step is None else self.step
            if not 0 <= step < steps:
                raise InputError(f"expected a step from 0 to {steps - 1}, got {step}")
            if done > step:
                tokens = torch.stack([watching.tokens[frame] for frame in frames])
                self.seen = Observed(site, step, steps, frames, tokens, watching.parts)
                raise Enough
            watching.parts = []

        module.progress = progress


def chosen(sites: list[str], site: str | None) -> str:
    """The site of this name, or by default one in the middle of the decoder.

    Raises:
        InputError: There is none.
    """
    if site is None:
        decoder = [name for name in sites if name.startswith("up_blocks")] or sites
        return decoder[len(decoder) // 2]
    for name in sites:
        if site in (name, name.removesuffix(".processor")):
            return name
    names = ", ".join(name.removesuffix(".processor") for name in sites)
    raise InputError(f"there is no site {site!r}; expected one of {names}")


def observe(
    run: Run, site: str | None = None, step: int | None = None, words: list[str] | None = None
) -> Observed:
    """What a site of a run's model sees at a step; its clip is inverted and sampled for it.

    Args:
        run: A run whose consistency is "tokenflow".
        site: A self-attention layer; in the middle of the decoder if not given.
        step: Of sampling, from 0; the middle one if not given.
        words: Further options, as of `tokenflow predict`.

    Raises:
        InputError: The run cannot be repeated, or has no such site or step.
    """
    probe = Probe(run, site, step)
    options = ["--config", str(run.folder / RECORD), *ALONE, *(words or [])]
    with suppress(Enough):
        predict(options, [probe])
    if probe.seen is None:
        raise InputError(
            f"{run.folder / RECORD} lists no clip {run.name!r} any more; expected the folder to "
            f"have its clip's name"
        )
    return probe.seen
