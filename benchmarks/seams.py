"""Windowed keyframe attention against full: what becomes of consistency in a long clip.

    python benchmarks/seams.py

prints the table of docs/long-clips.md. What is done is kept in a folder: started again, it goes on;
the table shows the rows that are done.
"""

from __future__ import annotations

import itertools
import math
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from jaxtyping import Bool
from miniature_edits import decoded
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor

from tokenflow.diffusion import Backbone, StableDiffusion
from tokenflow.engine import Sampling, Settings, edit_clip
from tokenflow.engine.keyframes import draw_keyframes
from tokenflow.engine.resume import ResumeStore
from tokenflow.miniature.edits import EDITOR, SceneEdit, suite
from tokenflow.miniature.scenes import LayerPath, Scene
from tokenflow.propagation import NNField, warp
from tokenflow.storage.cache import Cache
from tokenflow.video import contact_sheet, write_image

ENDS = 8
"""Frames at either end of a clip that are compared with those at the other."""


def wandering(edit: SceneEdit, frames: int) -> SceneEdit:
    """The edit's scene on paths that stay in the picture and do not repeat."""
    t = torch.arange(frames, dtype=torch.float32)

    def wave(size: float, period: float, phase: float) -> Tensor:
        return size * torch.sin(2 * math.pi * t / period + phase)

    scene = Scene(
        edit.scene.attributes,
        LayerPath(
            64 + wave(22, 140, 0), 64 + wave(16, 90, 1), 30 * wave(0.12, 170, 2).exp(), 0.02 * t
        ),
        LayerPath(64 + wave(20, 200, 0.5), 64 + wave(12, 130, 2), wave(0.05, 160, 1).exp(), 0 * t),
        edit.scene.texture,
        edit.scene.phase,
    )
    return SceneEdit(scene, edit.target)


def main(
    folder: Path = Path("runs/seams"),
    frames: int = 240,
    steps: int = 6,
    guidance: float = 4.0,
    keyframe_every: int = 8,
    number: int = 1,
    rows: tuple[str, ...] = ("full", "8/2", "4/2", "16/2", "8/0", "8/4"),
    fixed: tuple[str, ...] = (),
) -> None:
    """Edits one long clip in each way and prints the table of warp errors.

    Args:
        folder: Where results are kept.
        frames: Of the clip.
        steps: Of inversion and sampling.
        guidance: Scale of classifier-free guidance.
        keyframe_every: Frames in a window.
        number: Which of the suite's edits.
        rows: Ways to do it: "full", or "span/anchors".
        fixed: Those of them that are also done with seams at the same place in every step.
    """
    edit = wandering(suite(1)[number], frames)
    backbone = Backbone.load("miniature", dtype="float32")
    common: dict[str, Any] = {
        "steps": steps, "guidance": guidance, "keyframe_every": keyframe_every, "fusion": 0.0
    }  # fmt: skip
    ways = [(row, row, False) for row in rows] + [(f"{row}, fixed", row, True) for row in fixed]
    found: dict[str, dict[str, float]] = {}
    for name, row, still in ways:
        file = folder / f"{number}-{frames}-{steps}-{name.replace('/', '-')}.safetensors"
        settings = Settings(**common, **way(row))
        wanted = Wanted(edit.clip.name, settings, measured(frames))
        if not file.exists():
            store = ResumeStore(Cache(folder / "cache"), "EDITOR", name, save_every=1)
            unmoved = patch("tokenflow.engine.keyframes.shift", lambda span, step: 0)
            with unmoved if still else nullcontext(), wanted.alone():
                result = edit_clip(
                    backbone, edit.clip, edit.prompts, EDITOR, NNField(), settings,
                    store=store, on_step=wanted,
                )  # fmt: skip
            chosen = decoded(backbone, result.latents[wanted.measured])
            save_file({"frames": (255 * chosen).round().byte()}, file)
        shown = load_file(file)["frames"] / 255
        found[name] = errors(edit.scene, dict(zip(wanted.measured, shown, strict=True)))
        Console().print(name, *(f"{k} {1e3 * v:.3g}" for k, v in found[name].items()))
        write_image(file.with_suffix(".png"), contact_sheet(shown[::2].split(8)))

    full = found.get("full")
    table = Table(title=f"{edit.clip.name}, {frames} frames, {steps} steps; warp errors ×10⁻³")
    for column in ("span/anchors", *next(iter(found.values()))):
        table.add_column(column, justify="right")
    for name, row_errors in found.items():
        table.add_row(
            name,
            *(
                f"{1e3 * v:.2f}" + (f" ({v / full[k]:.2f})" if full else "")
                for k, v in row_errors.items()
            ),
        )
    Console(width=120).print(table)


def way(row: str) -> dict[str, Any]:
    """The settings of a row's name."""
    if row == "full":
        return {"keyframe_attention": "full"}
    span, anchors = map(int, row.split("/"))
    return {"keyframe_attention": "windowed", "span": span, "anchors": anchors}


def measured(frames: int) -> list[int]:
    """The frames of a clip that are compared: at its ends, and around its middle."""
    middle = frames // 2
    return [*range(ENDS), *range(middle, middle + 2 * ENDS), *range(frames - ENDS, frames)]


class Wanted:
    """Leaves out, in each step, the frames that are not measured and become no keyframes later on.

    Frames have an influence on others as keyframes alone, so those that are left are what they
    would be. It counts the steps as a progress callback.
    """

    def __init__(self, name: str, settings: Settings, measured: list[int]) -> None:
        self.settings, self.measured, self.name, self.done = settings, measured, name, 0

    def __call__(self, stage: str, done: int, steps: int) -> None:
        if stage == "edit":
            self.done = done

    def alone(self) -> Any:
        """A block in which the others are left out, and nothing is decoded."""

        def parts(sampling: Sampling, frames: range) -> list[range]:
            s, windows = self.settings, sampling.shard.windows
            later = range(self.done + 1, s.steps)
            drawn = [draw_keyframes(windows, s.keyframes, s.seed, self.name, i) for i in later]
            wanted = {*self.measured, *itertools.chain(*drawn)}
            return [range(frame, frame + 1) for frame in frames if frame in wanted]

        blank = patch.object(
            StableDiffusion, "decode", lambda _, codes: torch.zeros(len(codes), 3, 1, 1)
        )
        stack = ExitStack()
        every = patch.object(Sampling, "require_all", lambda *_: None)
        for change in (patch.object(Sampling, "parts", parts), every, blank):
            stack.enter_context(change)
        return stack


def errors(scene: Scene, frames: dict[int, Tensor]) -> dict[str, float]:
    """Warp errors by the true motion between frames near to and far from each other."""
    numbers = list(frames)
    begin, middle, end = numbers[:ENDS], numbers[ENDS:-ENDS], numbers[-ENDS:]
    ends = list(zip(begin, end, strict=True))
    halves = list(zip([*begin, *middle[ENDS:]], [*middle[:ENDS], *end], strict=True))
    near = [pair for run in (begin, middle, end) for pair in itertools.pairwise(run)]
    return {
        "ends, object": between(scene, frames, ends, on_object=True),
        "ends": between(scene, frames, ends),
        "half the clip, object": between(scene, frames, halves, on_object=True),
        "half the clip": between(scene, frames, halves),
        "neighbours": between(scene, frames, near),
    }


def between(
    scene: Scene,
    frames: dict[int, Tensor],
    pairs: list[tuple[int, int]],
    on_object: bool = False,
) -> float:
    """The mean squared difference of pairs of frames, the later warped to the earlier."""
    total, count = 0.0, 0
    for start, end in pairs:
        visible: Bool[Tensor, "h w"] = scene.visible(start, end)
        if on_object:
            visible &= scene.mask(start) > 0.5
        error = (warp(frames[end], scene.flow(start, end)) - frames[start]).square().mean(dim=0)
        total, count = total + float(error[visible].sum()), count + int(visible.sum())
    return total / count


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main, as_positional=False)
