"""What a sampling step costs in time and memory, by frames and by the keyframes' attention.

    python benchmarks/long_clips.py

prints the table of docs/long-clips.md.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from time import process_time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tokenflow.diffusion import Backbone, Trajectory
from tokenflow.editors import PnP
from tokenflow.engine import Settings, edit_latents
from tokenflow.propagation import NNField
from tokenflow.testing import tiny_backbone

SHAPE = (4, 8, 16)
"""Of a frame's latents."""


def main(
    ways: tuple[str, ...] = ("windowed/1", "windowed/8", "full/8"),
    frames: tuple[int, ...] = (24, 240, 2400),
    rounds: int = 3,
) -> None:
    """Prints time and memory of a sampling step with a tiny random UNet.

    Times are of equal work: of as many steps as make up the longest clip's frames. The clips take
    turns, and the quickest round counts, as what else a machine does comes and goes.

    Args:
        ways: Each the keyframes' attention, and frames in a window.
        frames: Of the clips.
        rounds: How often each is timed.
    """
    torch.set_num_threads(1)
    columns = ("attention", "keyframe_every", "frames", "ms/frame", "device MiB", "host KiB/frame")
    table = Table(*columns, title="a random UNet, latents of 8x16, PnP, NNField, one sampling step")
    console, backbone = Console(), tiny_backbone()
    for way in ways:
        attention, every = way.split("/")
        steps = {count: one_step(backbone, attention, int(every), count) for count in frames}
        steps[min(frames)]()  # what happens once
        times: dict[int, list[float]] = {count: [] for count in frames}
        for _ in range(rounds):
            for count, step in steps.items():
                often = max(frames) // count
                times[count].append(seconds(step, often) / often / count)
                console.print(way, count, f"{1e3 * times[count][-1]:.2f} ms/frame")
        for count, step in steps.items():
            device, host = most_bytes(backbone, step, count)
            measured = 1e3 * min(times[count]), device / 2**20, host / 2**10 / count
            table.add_row(attention, every, str(count), *(f"{x:.2f}" for x in measured))
    console.print(table)


def one_step(
    backbone: Backbone, attention: Any, keyframe_every: int, frames: int
) -> Callable[[], object]:
    """A sampling step of a random clip, ready to be run again and again."""
    schedule = backbone.schedule(1)
    clean = torch.randn(frames, *SHAPE, generator=torch.Generator().manual_seed(0))
    latents = torch.randn(1, *clean.shape, generator=torch.Generator().manual_seed(1))
    trajectory = Trajectory(schedule.timesteps, latents, clean, latents[0])
    settings = Settings(steps=1, keyframe_attention=attention, keyframe_every=keyframe_every)
    return lambda: edit_latents(
        backbone, trajectory, schedule, "a ball", PnP(), NNField(), settings
    )


def seconds(step: Callable[[], object], times: int) -> float:
    """Processor time."""
    begin = process_time()
    for _ in range(times):
        step()
    return process_time() - begin


def most_bytes(backbone: Backbone, step: Callable[[], object], frames: int) -> tuple[int, int]:
    """Bytes at most of what the UNet's passes make, and of all else.

    What passes make and leave is what would be on an accelerator: activations and the bank. All
    else is in host memory: trajectory, latents, and what a step makes of them.
    """
    inside, outside = Live(), Live()

    def enter(*_: Any) -> None:
        outside.__exit__(None, None, None)
        inside.__enter__()

    def leave(*_: Any) -> None:
        inside.__exit__(None, None, None)
        outside.__enter__()

    hooks = (
        backbone.unet.register_forward_pre_hook(enter),
        backbone.unet.register_forward_hook(leave),
    )
    with outside:
        step()
    for hook in hooks:
        hook.remove()
    latent = 4 * math.prod(SHAPE)
    return inside.peak, 3 * frames * latent + outside.peak  # clean, noisiest, of one step


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
