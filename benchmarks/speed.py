"""How fast an edit is, beside a plain transcription of the method, as docs/speed.md reports.

    python benchmarks/speed.py editing       # sampling alone, minutes
    python benchmarks/speed.py operations    # what is computed, and what has to be
    python benchmarks/speed.py compiled      # --model.compile, and from how many frames on it pays
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
from pathlib import Path
from statistics import median
from time import perf_counter, process_time

import torch
import transcription
import yaml
from jsonargparse import auto_cli
from operations import KINDS, Plan, executed, needed
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import normalize

from tokenflow.diffusion import Backbone, Schedule, StableDiffusion, Trajectory, invert
from tokenflow.diffusion.backbone import DTYPES
from tokenflow.editors import PnP, Prompts
from tokenflow.engine import Settings, SourceCache, edit_clip, edit_latents
from tokenflow.engine.keyframes import draw_keyframes, split_windows
from tokenflow.miniature.edits import suite
from tokenflow.propagation import Correspondence, NNField, Window
from tokenflow.video import Clip

AGREEMENT = 5e-5
"""Largest difference of float32 latents to the transcription's: its sums have another order."""
FAST = Path(__file__).parents[1] / "configs" / "fast.yaml"
SIDE, REPEATS = 2048, 5
"""Of the square matrices whose product's rate makes the floor, and how many are multiplied."""
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

    def ours(self, backbone: StableDiffusion, cache: SourceCache | None = None) -> Tensor:
        """The edited latents by tokenflow: a clip's second edit if another has filled the cache."""
        return edit_latents(
            backbone, self.trajectory, self.schedule, self.prompts, PnP(), NNField(),
            self.settings, source_cache=cache,
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


Matches = dict[tuple[int, str, int], Tensor]
"""Each token's two nearest neighbours, by step, site and frame."""


@contextmanager
def recorded() -> Iterator[Matches]:
    """A block in which NNField's matches are kept."""
    correspond, matches = NNField.correspond, Matches()

    def keeping(self: NNField, source: Tensor, keys: Tensor, window: Window) -> Correspondence:
        found = correspond(self, source, keys, window)
        for frame, indices in zip(window.frames, found.indices % source.shape[1], strict=True):
            matches[window.step, window.site, frame] = indices
        return found

    NNField.correspond = keeping
    try:
        yield matches
    finally:
        NNField.correspond = correspond


@dataclass
class Ties:
    """Tokens that the transcription would have matched elsewhere, and the largest difference of
    the two similarities.
    """

    tokens: int = 0
    difference: float = 0.0


@contextmanager
def ties_as(matches: Matches, case: Case) -> Iterator[Ties]:
    """A block in which the transcription takes our matches, and says how often its own differ.

    Of two tokens that are equally similar but for rounding either may be taken, and latents are
    others then.
    """
    every, nearest = case.settings.keyframe_every, transcription.nearest
    sites = dict.fromkeys(site for _, site, _ in matches)
    windows = split_windows(len(case.trajectory), every)
    calls = itertools.product(range(len(case.schedule)), windows, sites, (0, 1))
    ties = Ties()

    def shared(tokens: Tensor, keys: Tensor) -> Tensor:
        step, window, site, side = next(calls)
        own, itself = nearest(tokens, keys), torch.arange(tokens.shape[1])
        found = [matches.get((step, site, frame)) for frame in window]
        # a keyframe is not matched: its tokens take themselves
        ours = torch.stack([itself if pair is None else pair[:, side] for pair in found])
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


Runs = Mapping[str, Callable[[], object]]
Clock = Callable[[], float]


def turns(
    runs: Runs, rounds: int, console: Console, clock: Clock = perf_counter
) -> dict[str, list[float]]:
    """Seconds of runs that take turns, in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        for name, run in runs.items():
            begin = clock()
            run()
            seconds[name].append(clock() - begin)
            console.print(f"round {number + 1}: {name} {seconds[name][-1]:.2f} s")
    return seconds


def ratios(seconds: Mapping[str, list[float]], first: str, second: str) -> list[float]:
    """How many times as long one run takes as another in the same round."""
    return [a / b for a, b in zip(seconds[first], seconds[second], strict=True)]


def clock_of(threads: int) -> Clock:
    """Processor time of one thread, to which other work on the machine adds little."""
    return process_time if threads == 1 else perf_counter


def spread(values: list[float]) -> str:
    """The median, and the least and most."""
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def check(case: Case, backbone: StableDiffusion) -> str:
    """Whether the engine, without and with a filled cache, and the transcription agree."""
    cache = SourceCache()
    with recorded() as matches:
        first = case.ours(backbone, cache)
    second = case.ours(backbone, cache)
    with ties_as(matches, case) as ties:
        plain = case.transcribed(backbone)
    apart = [float((latents - plain).abs().max()) for latents in (first, second)]
    said = (
        f"first and second edit differ from the transcription by at most {apart[0]:.1e} and "
        f"{apart[1]:.1e} ({AGREEMENT:.0e} is allowed); {ties.tokens} tokens would be matched "
        f"elsewhere, as similar within {ties.difference:.1e}"
    )
    if max(apart) > AGREEMENT or ties.difference > TIE:
        sys.exit(said)
    return said


@torch.no_grad()
def editing(
    frames: int = 16,
    every: int = 4,
    steps: int = 10,
    rounds: int = 3,
    clip: int = 1,
    dtypes: tuple[str, ...] = ("float32", "bfloat16"),
    threads: int = 1,
) -> None:
    """Sampling with the embedded model and PnP, beside the transcription in float32.

    Args:
        frames: Of the clip.
        every: Frames in a window.
        steps: Of sampling.
        rounds: How often everything is timed.
        clip: Which of the suite's four scenes.
        dtypes: Of our networks.
        threads: Of PyTorch.
    """
    torch.set_num_threads(threads)
    console, edit, clock = Console(width=120), suite(frames)[clip], clock_of(threads)
    single = StableDiffusion.load("miniature", "cpu", "float32")
    case = Case.of(single, edit.clip, edit.prompts, steps, every)
    console.print(check(case, single))
    runs: dict[str, Callable[[], object]] = {"transcription": lambda: case.transcribed(single)}
    plan, floors = case.plan(single), dict[str, tuple[str, float]]()
    least = [needed(single.unet, plan, second).total() for second in (False, True)]
    for dtype in dtypes:
        backbone, cache = StableDiffusion.load("miniature", "cpu", dtype), SourceCache()
        case.ours(backbone, cache)
        names = [f"{dtype}, {which} edit" for which in ("first", "second")]
        runs[names[0]] = lambda backbone=backbone: case.ours(backbone, SourceCache())
        runs[names[1]] = lambda backbone=backbone, cache=cache: case.ours(backbone, cache)
        product = f"{dtype}, {REPEATS} products of {SIDE}"
        a, b = (torch.randn(SIDE, SIDE).to(DTYPES[dtype]) for _ in range(2))
        runs[product] = lambda a=a, b=b: [a @ b for _ in range(REPEATS)]
        for name, count in zip(names, least, strict=True):
            floors[name] = product, count / (REPEATS * 2 * SIDE**3)
    seconds = turns(runs, rounds, console, clock)
    table = Table(
        "", "s", "times as fast as the transcription", "times its floor",
        title=f"{frames} frames, windows of {every}, {steps} steps, {threads} threads, {rounds} "
        f"rounds: median (least to most)",
    )  # fmt: skip
    for name, times in seconds.items():
        faster = above = ""
        if name in floors:
            product, count = floors[name]
            faster = spread(ratios(seconds, "transcription", name))
            above = spread([ratio / count for ratio in ratios(seconds, name, product)])
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
    plan, unet, cache = case.plan(backbone), backbone.unet, SourceCache()
    first, second = (needed(unet, plan, again) for again in (False, True))
    rows = {
        "transcription": (executed(unet, lambda: case.transcribed(backbone)), first),
        "tokenflow, first edit": (executed(unet, lambda: case.ours(backbone, cache)), first),
        "needed for it": (first, first),
        "tokenflow, second edit": (executed(unet, lambda: case.ours(backbone, cache)), second),
        "needed for it ": (second, second),
    }
    table = Table("10⁹ operations", *KINDS, "all", "executed / needed")
    for name, (found, least) in rows.items():
        counts = (
            f"{count / 1e9:.1f}" for count in (*(found[kind] for kind in KINDS), found.total())
        )
        table.add_row(name, *counts, f"{found.total() / least.total():.3f}")
    Console(width=120).print(table)


@torch.no_grad()
def compiled(
    frames: int = 16,
    every: int = 4,
    steps: int = 4,
    rounds: int = 3,
    clip: int = 1,
    dtype: str = "float32",
    threads: int = 1,
) -> None:
    """Sampling by the compiled network beside the plain one, and what compiling takes.

    Args:
        frames: Of the clip.
        every: Frames in a window.
        steps: Of sampling.
        rounds: How often both are timed.
        clip: Which of the suite's four scenes.
        dtype: Of the networks.
        threads: Of PyTorch.
    """
    torch.set_num_threads(threads)
    console, edit, clock = Console(width=120), suite(frames)[clip], clock_of(threads)
    plain, quick = (StableDiffusion.load("miniature", "cpu", dtype) for _ in range(2))
    begin = perf_counter()  # the compiler has processes of its own
    quick.compile()
    taken = perf_counter() - begin
    case = Case.of(plain, edit.clip, edit.prompts, steps, every)
    case.ours(quick)
    runs = {"plain": lambda: case.ours(plain), "compiled": lambda: case.ours(quick)}
    seconds = turns(runs, rounds, console, clock)
    gain = median(ratios(seconds, "plain", "compiled"))
    saved = median(seconds["plain"]) * (1 - 1 / gain) / frames / steps
    console.print(
        f"{dtype}: compiling took {taken:.0f} s; compiled, sampling is "
        f"{spread(ratios(seconds, 'plain', 'compiled'))} times as fast, which "
        + (
            f"pays from {taken / saved / 50:.0f} frames of 50 steps on"
            if gain > 1
            else "never pays"
        )
    )


def presets(
    frames: int = 24, rounds: int = 1, clip: int = 1, config: Path = FAST, threads: int = 1
) -> None:
    """A preset end to end beside the defaults, with the embedded model and PnP.

    Args:
        frames: Of the clip.
        rounds: How often both are timed.
        clip: Which of the suite's four scenes.
        config: The preset's file.
        threads: Of PyTorch.
    """
    torch.set_num_threads(threads)
    console, edit, clock = Console(width=120), suite(frames)[clip], clock_of(threads)
    backbone = Backbone.load("miniature", "cpu", "float32")
    settings = {"default": Settings(), config.stem: preset(config)}
    seconds = turns(
        {
            name: lambda chosen=chosen: edit_clip(
                backbone, edit.clip, edit.prompts, PnP(), NNField(), chosen
            )
            for name, chosen in settings.items()
        },
        rounds,
        console,
        clock,
    )
    console.print(
        f"{config.stem}: {spread(ratios(seconds, 'default', config.stem))} times as fast end to "
        f"end, {frames} frames, {threads} threads, {rounds} rounds"
    )


def preset(config: Path) -> Settings:
    """How a configuration of the command line edits clips."""
    return Settings(**yaml.safe_load(config.read_text())["model"])


if __name__ == "__main__":
    auto_cli([editing, operations, compiled, presets], as_positional=False)
