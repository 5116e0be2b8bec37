"""How fast an edit is, beside a plain transcription of the method, as docs/speed.md reports.

    python benchmarks/speed.py editing       # sampling alone, minutes
    python benchmarks/speed.py operations    # what is computed, and what has to be
    python benchmarks/speed.py presets       # configs/fast.yaml end to end beside configs/pnp.yaml

Everything that is compared takes turns in one process, and ratios are of one round's times.
"""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import torch
import transcription
from jsonargparse import auto_cli
from operations import KINDS, Plan, executed, needed
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import normalize

from tokenflow.diffusion import Schedule, StableDiffusion, Trajectory, invert
from tokenflow.diffusion.backbone import DTYPES
from tokenflow.editors import PnP, Prompts
from tokenflow.engine import Settings, edit_latents
from tokenflow.engine.keyframes import draw_keyframes, split_windows
from tokenflow.miniature.edits import suite
from tokenflow.propagation import Correspondence, NNField, Window
from tokenflow.video import Clip

AGREEMENT = 5e-5
"""Largest difference of float32 latents to the transcription's: its sums have another order."""
TIE = 1e-5
"""Largest difference of cosine similarities that is a tie."""


@dataclass(frozen=True)
class Case:
    """One clip's edit, inverted beforehand."""

    prompts: Prompts
    schedule: Schedule
    trajectory: Trajectory
    settings: Settings

    @classmethod
    def of(
        cls, backbone: StableDiffusion, clip: Clip, prompts: Prompts, steps: int, every: int
    ) -> Case:
        """A clip's, with the model's defaults."""
        schedule, latents = backbone.schedule(steps), backbone.encode(clip.frames)
        trajectory = invert(backbone, latents, prompts.inversion_prompt, schedule, steps)
        settings = Settings(steps=steps, keyframe_every=every).for_model(backbone)
        return cls(prompts, schedule, trajectory, settings)

    def draw(self, step: int) -> list[int]:
        """The keyframes of a step."""
        s = self.settings
        windows = split_windows(len(self.trajectory), s.keyframe_every)
        return draw_keyframes(windows, s.keyframes, s.seed, "clip", step)

    def plan(self, backbone: StableDiffusion) -> Plan:
        """What operations are counted for."""
        words = backbone.text_encoder.config.max_position_embeddings
        drawn = [self.draw(step) for step in range(len(self.schedule))]
        frames, size = len(self.trajectory), self.trajectory.size
        return Plan(frames, size, words, drawn, pnp_of(backbone))

    def ours(
        self, backbone: StableDiffusion, kernel: NNField | None = None, **options: Any
    ) -> Tensor:
        """The edited latents by tokenflow."""
        return edit_latents(
            backbone, self.trajectory, self.schedule, self.prompts, PnP(), kernel or NNField(),
            self.settings, **options,
        )  # fmt: skip

    def transcribed(self, backbone: StableDiffusion) -> Tensor:
        """The edited latents by the transcription."""
        scheduler, pnp = copy.deepcopy(backbone.scheduler), pnp_of(backbone)
        scheduler.set_timesteps(len(self.schedule))
        p = self.prompts
        text = backbone.embed([p.inversion_prompt, p.negative_prompt, p.prompt])["embeddings"]
        return transcription.edit(
            backbone.unet, scheduler, text, self.trajectory.latents, self.draw,
            self.settings.keyframe_every, self.settings.guidance, pnp,
        )  # fmt: skip


def pnp_of(backbone: StableDiffusion) -> transcription.PlugAndPlay:
    """The model's defaults."""
    own = backbone.defaults
    return transcription.PlugAndPlay(own.attention, own.features, own.feature_layers)


class Recorded(NNField):
    """NNField, whose matches are kept by step, site and frame."""

    def __init__(self) -> None:
        super().__init__()
        self.matches: dict[tuple[int, str, int], Tensor] = {}

    def correspond(self, source: Tensor, keys: Tensor, window: Window) -> Correspondence:
        found = super().correspond(source, keys, window)
        for frame, indices in zip(window.frames, found.indices % source.shape[1], strict=True):
            self.matches[window.step, window.site, frame] = indices
        return found


@dataclass
class Ties:
    """Tokens that the transcription would have matched elsewhere, and the largest difference of
    the two similarities.
    """

    tokens: int = 0
    difference: float = 0.0


@contextmanager
def ties_as(recorded: Recorded, case: Case) -> Iterator[Ties]:
    """A block in which the transcription takes our matches, and says how often its own differ.

    Of two tokens that are equally similar but for rounding either may be taken, and latents are
    others then.
    """
    every, nearest = case.settings.keyframe_every, transcription.nearest
    sites = dict.fromkeys(site for _, site, _ in recorded.matches)
    windows = split_windows(len(case.trajectory), every)
    calls = itertools.product(range(len(case.schedule)), windows, sites, (0, 1))
    ties = Ties()

    def shared(tokens: Tensor, keys: Tensor) -> Tensor:
        step, window, site, side = next(calls)
        own = nearest(tokens, keys)
        ours = torch.stack([recorded.matches[step, site, frame][:, side] for frame in window])
        tokens, keys = (normalize(x.double(), dim=-1) for x in (tokens, keys))
        rows = torch.arange(len(keys))[:, None]
        best, other = ((tokens * keys[rows, found]).sum(dim=-1) for found in (own, ours))
        ties.tokens += int((own != ours).sum())
        ties.difference = max(ties.difference, float((best - other).abs().max()))
        return ours

    transcription.nearest = shared
    try:
        yield ties
    finally:
        transcription.nearest = nearest


def turns(
    runs: Mapping[str, Callable[[], object]], rounds: int, console: Console
) -> dict[str, list[float]]:
    """Seconds of runs that take turns, in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        for name, run in runs.items():
            begin = perf_counter()
            run()
            seconds[name].append(perf_counter() - begin)
            console.print(f"round {number + 1}: {name} {seconds[name][-1]:.2f} s")
    return seconds


def spread(values: list[float]) -> str:
    """The median, and the least and most."""
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def ratios(seconds: Mapping[str, list[float]], first: str, second: str) -> list[float]:
    """How many times as long one run takes as another in the same round."""
    return [a / b for a, b in zip(seconds[first], seconds[second], strict=True)]


def product_rate(dtype: torch.dtype, side: int = 2048) -> float:
    """Operations a second of a large matrix product on this machine's cores, the best of five."""
    a, b = (torch.randn(side, side).to(dtype) for _ in range(2))
    times = turns({"": lambda: a @ b}, 5, Console(quiet=True))[""]
    return 2 * side**3 / min(times)


@torch.no_grad()
def editing(
    frames: int = 16,
    every: int = 4,
    steps: int = 10,
    rounds: int = 3,
    clip: int = 1,
    dtypes: tuple[str, ...] = ("float32", "bfloat16"),
) -> None:
    """Sampling with the embedded model and PnP, beside the transcription in float32.

    Args:
        frames: Of the clip.
        every: Frames in a window.
        steps: Of sampling.
        rounds: How often everything is timed.
        clip: Which of the suite's four scenes.
        dtypes: Of our networks.
    """
    console = Console(width=120)
    single = StableDiffusion.load("miniature", "cpu", "float32")
    edit = suite(frames)[clip]
    case = Case.of(single, edit.clip, edit.prompts, steps, every)
    recorded = Recorded()
    ours = {"first": case.ours(single, recorded)}
    with ties_as(recorded, case) as ties:
        plain = case.transcribed(single)
    apart = max(float((latents - plain).abs().max()) for latents in ours.values())
    console.print(
        f"latents differ by at most {apart:.1e} ({AGREEMENT:.0e} is allowed); {ties.tokens} tokens "
        f"would be matched elsewhere, as similar within {ties.difference:.1e}"
    )
    if apart > AGREEMENT or ties.difference > TIE:
        sys.exit("the transcription and the engine do not agree")
    runs: dict[str, Callable[[], object]] = {"transcription": lambda: case.transcribed(single)}
    floors: dict[str, float] = {}
    least = needed(single.unet, case.plan(single)).total()
    for name in dtypes:
        backbone = StableDiffusion.load("miniature", "cpu", name)
        runs[f"{name}, first edit"] = lambda backbone=backbone: case.ours(backbone)
        floors[f"{name}, first edit"] = least / product_rate(DTYPES[name])
    for run in runs.values():
        run()  # what happens once
    seconds = turns(runs, rounds, console)
    table = Table(
        "", "s", "times as fast as the transcription", "times its floor",
        title=f"{frames} frames, windows of {every}, {steps} steps, {torch.get_num_threads()} "
        f"threads, {rounds} rounds",
    )  # fmt: skip
    for name, times in seconds.items():
        above = spread([t / floors[name] for t in times]) if name in floors else ""
        faster = spread(ratios(seconds, "transcription", name))
        table.add_row(name, spread(times), faster, above)
    console.print(table)


@torch.no_grad()
def operations(frames: int = 16, every: int = 4, steps: int = 10, clip: int = 1) -> None:
    """What an edit computes, by tokenflow and by the transcription, and what it has to compute.

    Args:
        frames: Of the clip.
        every: Frames in a window.
        steps: Of sampling.
        clip: Which of the suite's four scenes.
    """
    backbone, edit = StableDiffusion.load("miniature", "cpu", "float32"), suite(frames)[clip]
    case = Case.of(backbone, edit.clip, edit.prompts, steps, every)
    plan, unet = case.plan(backbone), backbone.unet
    first, second = needed(unet, plan), needed(unet, plan, second=True)
    rows = {
        "needed, first edit": (first, first),
        "tokenflow, first edit": (executed(unet, lambda: case.ours(backbone)), first),
        "transcription": (executed(unet, lambda: case.transcribed(backbone)), first),
        "needed, second edit": (second, second),
    }
    table = Table("10⁹ operations", *KINDS, "all", "executed / needed")
    for name, (found, least) in rows.items():
        counts = (f"{found[kind] / 1e9:.1f}" for kind in (*KINDS,))
        total = found.total()
        table.add_row(name, *counts, f"{total / 1e9:.1f}", f"{total / least.total():.3f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    auto_cli([editing, operations], as_positional=False)
