"""Windowed keyframe attention against full: what long clips cost, and what becomes of consistency.

    python benchmarks/long_clips.py seams
    python benchmarks/long_clips.py cost

print the tables of docs/long-clips.md. `seams` keeps what it has in its folder: started again, it
goes on; its table shows the rows that are done.
"""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
import weakref
from contextlib import ExitStack, nullcontext
from pathlib import Path
from time import process_time
from typing import Any
from unittest.mock import patch

import torch
from jaxtyping import Bool
from miniature_edits import decoded
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tokenflow.diffusion import Backbone, Trajectory
from tokenflow.editors import PnP
from tokenflow.engine import Settings, edit_clip, edit_latents
from tokenflow.engine.cache import Cache
from tokenflow.engine.denoising import Denoiser
from tokenflow.engine.recall import Recall
from tokenflow.engine.windows import draw_keyframes
from tokenflow.miniature.edits import EDITOR, SceneEdit, suite
from tokenflow.miniature.scenes import Path as Motion
from tokenflow.miniature.scenes import Scene
from tokenflow.propagation import NNField
from tokenflow.propagation.optical_flow import warp
from tokenflow.testing import tiny_backbone
from tokenflow.video import contact_sheet, write_image

ENDS = 8
"""Frames at either end of a clip that are compared with those at the other."""
LEAST = 5.0
"""Seconds of sampling steps of which the quickest counts."""


def wandering(edit: SceneEdit, frames: int) -> SceneEdit:
    """The edit's scene on paths that stay in the picture and do not repeat."""
    t = torch.arange(frames, dtype=torch.float32)

    def wave(size: float, period: float, phase: float) -> Tensor:
        return size * torch.sin(2 * math.pi * t / period + phase)

    scene = Scene(
        edit.scene.attributes,
        Motion(
            64 + wave(22, 140, 0), 64 + wave(16, 90, 1), 30 * wave(0.12, 170, 2).exp(), 0.02 * t
        ),
        Motion(64 + wave(20, 200, 0.5), 64 + wave(12, 130, 2), wave(0.05, 160, 1).exp(), 0 * t),
        edit.scene.texture,
        edit.scene.phase,
    )
    return SceneEdit(scene, edit.target)


def seams(
    folder: Path = Path("runs/long_clips"),
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
    backbone = Backbone.load("miniature")
    common: dict[str, Any] = {
        "steps": steps, "guidance": guidance, "keyframe_every": keyframe_every
    }  # fmt: skip
    ways = [(row, row, False) for row in rows] + [(f"{row}, fixed", row, True) for row in fixed]
    found: dict[str, dict[str, float]] = {}
    for name, row, still in ways:
        file = folder / f"{number}-{frames}-{steps}-{name.replace('/', '-')}.safetensors"
        settings = Settings(**common, **way(row))
        wanted = Wanted(edit.clip.name, settings, measured(frames))
        if not file.exists():
            recall = Recall(Cache(folder / "cache"), "EDITOR", name, save_every=1)
            unmoved = patch("tokenflow.engine.spans.shift", lambda span, step: 0)
            with unmoved if still else nullcontext(), wanted.alone():
                result = edit_clip(
                    backbone, edit.clip, str(edit.target), EDITOR, NNField(), settings=settings,
                    inversion_prompt=str(edit.scene.attributes), recall=recall, progress=wanted,
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
    """The settings that a row's name says."""
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
    would be. It is told of progress.
    """

    def __init__(self, name: str, settings: Settings, measured: list[int]) -> None:
        self.settings, self.measured, self.name, self.done = settings, measured, name, 0

    def __call__(self, stage: str, done: int, steps: int) -> None:
        if stage == "edit":
            self.done = done

    def alone(self) -> Any:
        """A block in which the others are left out, and nothing is decoded."""

        def parts(denoiser: Denoiser, frames: range) -> list[range]:
            s, windows = self.settings, denoiser.share.windows
            later = range(self.done + 1, s.steps)
            drawn = [draw_keyframes(windows, s.keyframes, s.seed, self.name, i) for i in later]
            wanted = {*self.measured, *itertools.chain(*drawn)}
            return [range(frame, frame + 1) for frame in frames if frame in wanted]

        blank = patch.object(Backbone, "decode", lambda _, codes: torch.zeros(len(codes), 3, 1, 1))
        stack = ExitStack()
        for change in (patch.object(Denoiser, "parts", parts), blank):
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


def cost(
    cases: tuple[str, ...] = (
        *(f"windowed/1/{frames}" for frames in (24, 240, 2400)),
        *(f"windowed/8/{frames}" for frames in (24, 240, 2400)),
        *(f"full/8/{frames}" for frames in (24, 240, 2400)),
    ),
) -> None:
    """Prints time and memory of a sampling step with a tiny random UNet, each in its own process.

    Args:
        cases: Each the keyframes' attention, frames in a window, and frames.
    """
    columns = ("attention", "keyframe_every", "frames", "ms/frame", "device MiB", "host KiB/frame")
    table = Table(*columns, title="a random UNet, latents of 8x16, PnP, NNField, one sampling step")
    for case in cases:
        attention, every, frames = case.split("/")
        code = f"from long_clips import measure; print(measure({attention!r}, {every}, {frames}))"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=Path(__file__).parent, check=True,
            capture_output=True, text=True,
        )  # fmt: skip
        seconds, device, host = json.loads(done.stdout)
        measured = 1e3 * seconds / int(frames), device / 2**20, host / 2**10 / int(frames)
        table.add_row(attention, every, frames, *(f"{x:.2f}" for x in measured))
        Console().print(case, *(f"{x:.2f}" for x in measured))
    Console().print(table)


def measure(attention: Any, keyframe_every: int, frames: int) -> list[float]:
    """Processor seconds of a step, bytes at most of what the UNet's passes make, and of all else.

    What passes make and leave is what would be on an accelerator: activations and the bank. All
    else is in host memory: trajectory, latents, and what a step makes of them. It is counted in a
    run of its own, as counting takes time.
    """
    torch.set_num_threads(1)
    backbone = tiny_backbone()
    schedule = backbone.schedule(1)
    clean = torch.randn(frames, 4, 8, 16, generator=torch.Generator().manual_seed(0))
    latents = torch.randn(1, *clean.shape, generator=torch.Generator().manual_seed(1))
    trajectory = Trajectory(
        schedule.timesteps, latents, clean, latents[0], schedule.alpha(schedule.timesteps[0])
    )
    settings = Settings(steps=1, keyframe_attention=attention, keyframe_every=keyframe_every)

    def sample() -> None:
        edit_latents(backbone, trajectory, schedule, PnP(), NNField(), "a ball", settings=settings)

    times: list[float] = []
    while sum(times) < LEAST:
        begin = process_time()
        sample()
        times.append(process_time() - begin)
    inside, outside = Live(), Live()

    def enter(*_: Any) -> None:
        outside.__exit__(None, None, None)
        inside.__enter__()

    def leave(*_: Any) -> None:
        inside.__exit__(None, None, None)
        outside.__enter__()

    backbone.unet.register_forward_pre_hook(enter)
    backbone.unet.register_forward_hook(leave)
    with outside:
        sample()
    kept = latents.nbytes + 2 * clean.nbytes
    return [min(times), inside.peak, kept + outside.peak]


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that were made under it and are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage()._cdata for x in tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in {x.untyped_storage() for x in tensors(result)}:
            if storage._cdata not in given:
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self.freed, storage.nbytes())
        self.peak = max(self.peak, self.bytes)
        return result

    def freed(self, count: int) -> None:
        self.bytes -= count


def tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli([seams, cost], as_positional=False)
