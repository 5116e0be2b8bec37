"""What a sampling step costs in time and memory, by frames and by the keyframes' attention.

    python benchmarks/long_clips.py

prints the table of docs/long-clips.md.
"""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from pathlib import Path
from time import process_time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tokenflow.diffusion import Trajectory
from tokenflow.editors import PnP
from tokenflow.engine import Settings, edit_latents
from tokenflow.propagation import NNField
from tokenflow.testing import tiny_backbone

LEAST = 5.0
"""Seconds of sampling steps of which the quickest counts."""


def main(
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

    auto_cli(main, as_positional=False)
