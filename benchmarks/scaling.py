"""How one clip's edit scales over ranks: a model, from counted operations and bytes.

    python benchmarks/scaling.py            # Stable Diffusion 2.1's size
    python benchmarks/scaling.py --compare true    # the model beside two processes of this machine

Nothing is run at Stable Diffusion's size: PyTorch counts the operations of its UNet on tensors
without contents. The options are its assumptions, which are printed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import yaml
from diffusers import UNet2DConditionModel
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tokenflow.diffusion import Backbone
from tokenflow.diffusion.sites import DiffusersSite
from tokenflow.diffusion.unet import attention_sites
from tokenflow.engine.attention import AttentionSwitch, JointAttention
from tokenflow.engine.joint_passes import overlap
from tokenflow.engine.keyframes import spans

SD21 = dict(
    sample_size=64, cross_attention_dim=1024, block_out_channels=(320, 640, 1280, 1280),
    attention_head_dim=(5, 10, 20, 20), use_linear_projection=True,
)  # fmt: skip
ENCODE, DECODE = 1117e9, 2515e9
"""Operations of the VAE for a frame of 512x512 pixels; each multiplication and addition is one."""


@dataclass(frozen=True)
class Cost:
    """Operations of a UNet for one frame, and what leaves a rank.

    Attributes:
        forward: In one branch, with attention as it is.
        joint: In all three branches, with one keyframe to attend to.
        further: More for every further keyframe that it attends to.
        propagated: In all three branches, without attention, with the matching of two keyframes.
        features: Σ over sites of tokens × channels.
    """

    forward: float
    joint: float
    further: float
    propagated: float
    features: int


def counted(unet: UNet2DConditionModel) -> Cost:
    """The operations of a UNet on the meta device."""
    size, width = unet.config.sample_size, unet.config.cross_attention_dim
    sites: dict[str, tuple[int, int]] = {}

    switch = AttentionSwitch(attention_sites(unet, "attn1"))

    def skipped(site: DiffusersSite, hidden_states: Tensor, *_, **__) -> Tensor:
        sites[site.name] = hidden_states.shape[1:]
        return hidden_states

    def operations(batch: int, attention=None) -> int:
        x = torch.empty(batch, unet.config.in_channels, size, size, device="meta")
        text = torch.empty(batch, 77, width, device="meta")
        with FlopCounterMode(display=False) as counter:
            if attention is None:
                unet(x, torch.zeros(batch, device="meta"), text)
            else:
                switch.attention = attention
                with switch.installed():
                    unet(x, torch.zeros(batch, device="meta"), text)
        return counter.get_total_flops()

    forward, propagated = operations(1), operations(3, skipped)
    one, two = (operations(3 * k, JointAttention(3)) / k for k in (1, 2))
    matching = sum(2 * 2 * n * n * c for n, c in sites.values())
    features = sum(n * c for n, c in sites.values())
    return Cost(forward, one, two - one, propagated + matching, features)


@dataclass(frozen=True)
class Plan:
    """What is edited, and on what; see `main`."""

    frames: int
    every: int
    steps: int
    span: int | None
    anchors: int
    speed: float
    near: float
    far: float
    node: int


def seconds(cost: Cost, plan: Plan, ranks: int) -> tuple[float, float]:
    """The edit's time on so many ranks, and how much of it ranks wait for bytes."""
    windows = ceil(plan.frames / plan.every)
    each, more = divmod(windows, ranks)
    stops = [(rank + 1) * each + min(rank + 1, more) for rank in range(ranks)]
    slowest = waited = 0.0
    for rank, stop in enumerate(stops):
        own = range(stops[rank - 1] if rank else 0, stop)
        frames = len(own) * plan.every
        work = frames * (ENCODE + DECODE + plan.steps * cost.forward)
        work += (frames - len(own)) * plan.steps * cost.propagated  # all but the keyframes
        if plan.span is None:
            passes = [(len(own), windows)]
        else:
            # the seams lie elsewhere in every other step
            each_way = [spans(windows, plan.span, plan.anchors, step) for step in (0, 1)]
            seen = [s.keyframes for some in each_way for s in some if overlap(s.windows, own)]
            passes = [(len(keyframes) / 2, len(keyframes)) for keyframes in seen]
        work += plan.steps * sum(k * (cost.joint + (n - 1) * cost.further) for k, n in passes)
        slowest = max(slowest, work / plan.speed)
    if ranks > 1 and plan.span is None:
        gathered = (ranks - 1) * ceil(windows / ranks) * 4 * cost.features * 2
        halo = 2 * 4 * cost.features * 2
        waited = plan.steps * (gathered + halo) / (plan.near if ranks <= plan.node else plan.far)
    return slowest + waited, waited


def measured(devices: int, every: int) -> float:
    """Seconds of the embedded model's edit of the bundled clip, one thread a process."""
    with TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "tokenflow.cli", "predict", "--config=configs/demo.yaml",
            "--model.steps=6", "--model.cache=null", f"--model.keyframe_every={every}",
            f"--trainer.devices={devices}", "--trainer.strategy=ddp", f"--output.folder={folder}",
            "--trainer.accelerator=cpu",
        ]  # fmt: skip
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, env=env, capture_output=True)
        record = yaml.safe_load((Path(folder) / "blue_ball" / "run.yaml").read_text())["run"]
    return float(sum(record["seconds"].values()))


def check() -> None:
    """The model's split of the work beside that of two processes of this machine."""
    unet = UNet2DConditionModel.from_config(Backbone.load("miniature", "cpu").unet.config)
    cost, table = counted(unet.to("meta")), Table("frames a window", "measured", "model")
    for every in (4, 5, 8):
        plan = Plan(24, every, 6, 8, 2, 1.0, 1.0, 1.0, 2)
        model = seconds(cost, plan, 2)[0] / seconds(cost, plan, 1)[0]
        table.add_row(str(every), f"{measured(2, every) / measured(1, every):.2f}", f"{model:.2f}")
    Console(width=110).print(table, "time of two processes to that of one")


def main(
    compare: bool = False,
    frames: tuple[int, ...] = (120, 1000),
    every: int = 8,
    steps: int = 50,
    span: int = 8,
    anchors: int = 2,
    tflops: float = 160.0,
    near: float = 200.0,
    far: float = 25.0,
    node: int = 8,
) -> None:
    """Time and efficiency over ranks, by the attention among keyframes.

    Args:
        compare: Compare the model with this machine instead.
        frames: Of a clip of 512x512 pixels.
        every: Frames in a window.
        steps: Of inversion and of sampling.
        span: Of windowed attention, in windows.
        anchors: Of windowed attention.
        tflops: 10¹² operations a second that a device really does; `accelerator.py` measures them.
        near: Gigabytes a second that come to a device from others of its node.
        far: From others.
        node: Devices of a node.
    """
    if compare:
        check()
        return
    with torch.device("meta"):
        cost = counted(UNet2DConditionModel(**SD21))
    console = Console(width=110)
    console.print(
        f"operations, 10⁹: forward {cost.forward / 1e9:.0f} a branch, joint "
        f"{cost.joint / 1e9:.0f} + {cost.further / 1e9:.0f} for each further keyframe, propagated "
        f"{cost.propagated / 1e9:.0f}; features of a branch {cost.features / 1e6:.1f} million"
    )
    for count in frames:
        table = Table(
            "ranks", "full: s", "speedup", "efficiency", "communication", "windowed: s", "speedup",
            "efficiency", title=f"{count} frames",
        )  # fmt: skip
        whole: dict[bool, float] = {}
        for ranks in (1, 2, 4, 8, 16, 32, 64):
            row = [str(ranks)]
            for bounded in (False, True):
                plan = Plan(
                    count, every, steps, span if bounded else None, anchors, tflops * 1e12,
                    near * 1e9, far * 1e9, node,
                )  # fmt: skip
                took, waited = seconds(cost, plan, ranks)
                speedup = whole.setdefault(bounded, took) / took
                row += [f"{took:.0f}", f"{speedup:.1f}", f"{speedup / ranks:.0%}"]
                if not bounded:
                    row.append(f"{waited / took:.0%}")
            table.add_row(*row)
        console.print(table)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
