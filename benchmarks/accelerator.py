"""What an edit costs on an accelerator at Stable Diffusion 2.1's size: time by stage, and memory.

    python benchmarks/accelerator.py

Weights are random, which takes no other time than trained ones. The floor is what PyTorch counts as
operations, at the rate of a large matrix product, measured in the same run.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Literal

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table
from scaling import DECODE, ENCODE, SD21, Cost, Plan, counted, seconds
from transformers import CLIPTextConfig, CLIPTextModel

from tokenflow.diffusion import Backbone, StableDiffusion
from tokenflow.diffusion.backbone import DTYPES
from tokenflow.editors import PnP
from tokenflow.engine import Settings, edit_clip
from tokenflow.propagation import NNField
from tokenflow.video import Clip

SIDE = 512
VAE = dict(
    down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(128, 256, 512, 512), layers_per_block=2, scaling_factor=0.18215,
)  # fmt: skip
NOISE = dict(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
    set_alpha_to_one=False, steps_offset=1,
)  # fmt: skip
PRODUCT = 8192
"""Side of the matrices whose product's rate is taken for what the device can do."""


def random_backbone(device: str, dtype: torch.dtype) -> Backbone:
    """Networks of Stable Diffusion 2.1's size, but for the text encoder, with random weights."""
    torch.manual_seed(0)
    tokenizer = Backbone.load("miniature", "cpu").tokenizer
    words = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=SD21["cross_attention_dim"], num_hidden_layers=1
    )
    with torch.device(device):
        networks = UNet2DConditionModel(**SD21), AutoencoderKL(**VAE), CLIPTextModel(words)
    parts = (network.to(device, dtype) for network in networks)
    return StableDiffusion(*parts, tokenizer, DDIMScheduler(**NOISE))


def timed(run: Callable[[], object]) -> float:
    """Seconds until the device is done."""
    torch.cuda.synchronize()
    begin = perf_counter()
    run()
    torch.cuda.synchronize()
    return perf_counter() - begin


def product_rate(device: str, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product, the median of ten."""
    a, b = (torch.randn(PRODUCT, PRODUCT, device=device, dtype=dtype) for _ in range(2))
    times = sorted(timed(lambda: a @ b) for _ in range(13))[:10]
    return 2 * PRODUCT**3 / times[5]


class Peaks:
    """Bytes on the device at most in each stage, beside what was there before."""

    def __init__(self) -> None:
        self.before, self.bytes = torch.cuda.memory_allocated(), dict[str, int]()
        torch.cuda.reset_peak_memory_stats()

    def __call__(self, stage: str, done: int, steps: int) -> None:
        peak = torch.cuda.max_memory_allocated() - self.before
        self.bytes[stage] = max(peak, self.bytes.get(stage, 0))
        torch.cuda.reset_peak_memory_stats()


def measured(
    backbone: Backbone, settings: Settings, frames: int
) -> tuple[dict[str, float], dict[str, int]]:
    """Seconds of each stage of an edit, and bytes on the device at most, without the weights."""
    few = torch.rand(min(frames, 24), 3, SIDE, SIDE)
    clip = Clip.from_frames(few.repeat(-(-frames // len(few)), 1, 1, 1)[:frames])
    peaks = Peaks()
    result = edit_clip(backbone, clip, "a ball", PnP(), NNField(), settings, on_step=peaks)
    return result.seconds, peaks.bytes


def operations(cost: Cost, settings: Settings, frames: int) -> dict[str, float]:
    """Operations of each stage."""
    span = settings.span if settings.keyframe_attention == "windowed" else None
    steps, every = settings.steps, settings.keyframe_every
    plan = Plan(frames, every, steps, span, settings.anchors, 1.0, 1.0, 1.0, 1)
    each = {"encode": ENCODE, "invert": steps * cost.forward, "decode": DECODE}
    stages = {stage: frames * count for stage, count in each.items()}
    return {**stages, "edit": seconds(cost, plan, 1)[0] - sum(stages.values())}


def main(
    device: str = "cuda",
    cases: tuple[str, ...] = ("full/24", "windowed/24", "full/240", "windowed/240"),
    steps: int = 4,
    batch: int = 8,
    dtype: Literal["float16", "bfloat16", "float32"] = "float16",
) -> None:
    """Time for a frame, in each step, and memory.

    Args:
        device: Which accelerator.
        cases: Each the keyframes' attention and frames.
        steps: Of inversion and of sampling.
        batch: Frames in one forward pass.
        dtype: Of the networks.
    """
    console = Console(width=120)
    with torch.device("meta"):
        cost = counted(UNet2DConditionModel(**SD21))
    kind = DTYPES[dtype]
    backbone, rate = random_backbone(device, kind), product_rate(device, kind)
    weights = torch.cuda.memory_allocated()
    name = torch.cuda.get_device_name()
    console.print(
        f"{name}: {rate / 1e12:.0f} TFLOP/s of a product; weights {weights / 2**20:.0f} MiB"
    )
    measured(backbone, Settings(steps=1, batch=batch), 2 * batch)  # what happens once
    table = Table(
        "attention", "frames", "stage", "ms", "TFLOP/s", "of the floor", "MiB beside weights",
        title="milliseconds a frame, of invert and edit also a step",
    )  # fmt: skip
    for case in cases:
        attention, frames = case.split("/")
        settings = Settings(steps=steps, batch=batch, keyframe_attention=attention)  # type: ignore[arg-type]
        took, peaks = measured(backbone, settings, int(frames))
        work = operations(cost, settings, int(frames))
        for stage, time in took.items():
            each = int(frames) * (steps if stage in ("invert", "edit") else 1)
            speed = work[stage] / time
            table.add_row(
                attention, frames, stage, f"{1e3 * time / each:.2f}", f"{speed / 1e12:.0f}",
                f"{rate / speed:.1f}", f"{peaks[stage] / 2**20:.0f}",
            )  # fmt: skip
            console.print(case, stage, f"{1e3 * time / each:.2f} ms")
    console.print(table)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
