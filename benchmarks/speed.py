"""How fast an edit is, beside a plain transcription of the method, as docs/speed.md reports.

    python benchmarks/speed.py editing       # sampling alone, minutes
    python benchmarks/speed.py operations    # what is computed, and what has to be
    python benchmarks/speed.py presets       # configs/fast.yaml end to end beside configs/pnp.yaml

Everything that is compared takes turns in one process, and ratios are of one round's times.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import torch
import transcription
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tokenflow.diffusion import Schedule, StableDiffusion, Trajectory, invert
from tokenflow.editors import PnP, Prompts
from tokenflow.engine import Settings, edit_latents
from tokenflow.engine.keyframes import draw_keyframes, split_windows
from tokenflow.miniature.edits import suite
from tokenflow.propagation import NNField
from tokenflow.video import Clip

AGREEMENT = 5e-5
"""Largest difference of float32 latents to the transcription's: its sums have another order."""


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

    def ours(self, backbone: StableDiffusion, **options: Any) -> Tensor:
        """The edited latents by tokenflow."""
        return edit_latents(
            backbone, self.trajectory, self.schedule, self.prompts, PnP(), NNField(),
            self.settings, **options,
        )  # fmt: skip

    def transcribed(self, backbone: StableDiffusion) -> Tensor:
        """The edited latents by the transcription."""
        scheduler, own = copy.deepcopy(backbone.scheduler), backbone.defaults
        scheduler.set_timesteps(len(self.schedule))
        p, pnp = self.prompts, (own.attention, own.features, own.feature_layers)
        text = backbone.embed([p.inversion_prompt, p.negative_prompt, p.prompt])["embeddings"]
        return transcription.edit(
            backbone.unet, scheduler, text, self.trajectory.latents, self.draw,
            self.settings.keyframe_every, self.settings.guidance, transcription.PlugAndPlay(*pnp),
        )  # fmt: skip


def turns(
    runs: dict[str, Callable[[], Tensor]], rounds: int, console: Console
) -> tuple[dict[str, Tensor], dict[str, list[float]]]:
    """Results of runs that take turns, and their seconds in each round after the first one, in
    which happens what happens once.
    """
    results, seconds = dict[str, Tensor](), dict[str, list[float]]()
    for number in range(rounds + 1):
        for name, run in runs.items():
            begin = perf_counter()
            results[name] = run()
            took = perf_counter() - begin
            console.print(f"round {number}: {name} {took:.2f} s")
            if number:
                seconds.setdefault(name, []).append(took)
    return results, seconds


def spread(values: list[float]) -> str:
    """The median, and the least and most."""
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


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
        clip: Which of the suite's four scenes. Where two tokens are equally similar but for
            rounding, either may be taken, and latents differ: such ties are rare on textured
            scenes, as these are, and common on plain ones.
        dtypes: Of our networks.
    """
    console = Console(width=120)
    backbones = {name: StableDiffusion.load("miniature", "cpu", name) for name in dtypes}
    single = StableDiffusion.load("miniature", "cpu", "float32")
    edit = suite(frames)[clip]
    case = Case.of(single, edit.clip, edit.prompts, steps, every)
    runs = {"transcription": lambda: case.transcribed(single)}
    for name, backbone in backbones.items():
        runs[f"{name}, first edit"] = lambda backbone=backbone: case.ours(backbone)
    results, seconds = turns(runs, rounds, console)
    plain = results["transcription"]
    table = Table(
        "", "s", "times as fast as the transcription", "largest difference to it",
        title=f"{frames} frames, windows of {every}, {steps} steps, {torch.get_num_threads()} "
        f"threads, {rounds} rounds",
    )  # fmt: skip
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(seconds["transcription"], times, strict=True)]
        apart = float((results[name] - plain).abs().max())
        table.add_row(name, spread(times), spread(ratios), f"{apart:.1e}")
        if name.startswith("float32") and apart > AGREEMENT:
            sys.exit(
                f"{name} differs from the transcription by {apart:.1e}: {AGREEMENT} is allowed"
            )
    console.print(table)


if __name__ == "__main__":
    auto_cli([editing], as_positional=False)
