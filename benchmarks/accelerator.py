"""What an edit costs on an accelerator at Stable Diffusion 2.1's size: time and memory.

    python benchmarks/accelerator.py rows      # of docs/speed.md, under 8 minutes on one H200
    python benchmarks/accelerator.py stages    # of docs/long-clips.md

With `--device cpu --tiny true` either runs at a tiny size, to see that it does. Weights are random,
which takes no other time than trained ones. The floor is the time of the operations that the method
needs, at the rate of a large matrix product, measured in the same run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Literal

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from jsonargparse import auto_cli
from operations import needed
from rich.console import Console
from rich.table import Table
from scaling import DECODE, ENCODE, SD21, Cost, Plan, counted, seconds
from speed import FAST, Case, preset, spread, turns
from transformers import CLIPTextConfig, CLIPTextModel

from tokenflow.diffusion import Backbone, StableDiffusion, Trajectory
from tokenflow.diffusion.backbone import DTYPES
from tokenflow.editors import PnP, Prompts
from tokenflow.engine import Settings, SourceCache, edit_clip
from tokenflow.propagation import NNField
from tokenflow.testing import tiny_backbone
from tokenflow.video import Clip

VAE = dict(
    down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(128, 256, 512, 512), layers_per_block=2, scaling_factor=0.18215,
)  # fmt: skip
NOISE = dict(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
    set_alpha_to_one=False, steps_offset=1,
)  # fmt: skip
PROMPTS = Prompts("a blue ball", "", "a ball")


@dataclass(frozen=True)
class Setup:
    """Where and at what size things are measured.

    Attributes:
        device: Which accelerator, or "cpu".
        tiny: Whether networks and frames are tiny.
    """

    device: str
    tiny: bool

    def backbone(self, dtype: torch.dtype) -> StableDiffusion:
        """Networks with random weights."""
        if not self.tiny:
            return random_backbone(self.device, dtype)
        backbone = tiny_backbone()
        for network in (backbone.unet, backbone.vae, backbone.text_encoder):
            network.to(self.device, dtype)
        return backbone

    def clip(self, frames: int) -> Clip:
        """Random frames, of which 24 differ."""
        height, width = (16, 32) if self.tiny else (512, 512)
        few = torch.rand(min(frames, 24), 3, height, width)
        return Clip.from_frames(few.repeat(-(-frames // len(few)), 1, 1, 1)[:frames])

    def rate(self, dtype: torch.dtype) -> float:
        """Operations a second of a large matrix product."""
        return product_rate(dtype, self.device, side=256 if self.tiny else 8192)

    def weights(self) -> int:
        """Bytes on the device."""
        return torch.accelerator.memory_allocated() if self.device != "cpu" else 0

    def name(self) -> str:
        """The device's."""
        return "a CPU" if self.device == "cpu" else torch.cuda.get_device_name()


def product_rate(dtype: torch.dtype, device: str, side: int) -> float:
    """Operations a second of a large matrix product, the median of ten."""
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))

    def product() -> None:
        float((a @ b)[0, 0])  # which waits for the device

    times = turns({"product": product}, 13, Console(quiet=True))["product"]
    return 2 * side**3 / median(times[3:])


def random_backbone(device: str, dtype: torch.dtype) -> StableDiffusion:
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


class Peaks:
    """Bytes on the device at most in each stage, beside what was there before; 0 on a CPU."""

    def __init__(self, setup: Setup) -> None:
        self.setup, self.before, self.bytes = setup, setup.weights(), dict[str, int]()
        self.peak()

    def peak(self) -> int:
        """Since the last call."""
        if self.setup.device == "cpu":
            return 0
        peak = torch.accelerator.max_memory_allocated()
        torch.accelerator.reset_peak_memory_stats()
        return peak - self.before

    def __call__(self, stage: str, done: int, steps: int) -> None:
        self.bytes[stage] = max(self.peak(), self.bytes.get(stage, 0))


def measured(
    setup: Setup, backbone: Backbone, settings: Settings, frames: int
) -> tuple[dict[str, float], dict[str, int]]:
    """Seconds of each stage of an edit, and bytes on the device at most, without the weights."""
    clip, peaks = setup.clip(frames), Peaks(setup)
    result = edit_clip(backbone, clip, PROMPTS, PnP(), NNField(), settings, on_step=peaks)
    return result.seconds, peaks.bytes


def operations(cost: Cost, settings: Settings, frames: int) -> dict[str, float]:
    """Operations of each stage."""
    span = settings.span if settings.keyframe_attention == "windowed" else None
    steps, every = settings.steps, settings.keyframe_every
    plan = Plan(frames, every, steps, span, settings.anchors, 1.0, 1.0, 1.0, 1)
    each = {"encode": ENCODE, "invert": steps * cost.forward, "decode": DECODE}
    stages = {stage: frames * count for stage, count in each.items()}
    return {**stages, "edit": seconds(cost, plan, 1)[0] - sum(stages.values())}


def stages(
    device: str = "cuda",
    cases: tuple[str, ...] = ("full/24", "windowed/24", "full/240", "windowed/240"),
    steps: int = 4,
    batch: int = 8,
    dtype: Literal["float16", "bfloat16", "float32"] = "float16",
    tiny: bool = False,
) -> None:
    """Time for a frame, in each step, and memory.

    Args:
        device: Which accelerator.
        cases: Each the keyframes' attention and frames.
        steps: Of inversion and of sampling.
        batch: Frames in one forward pass.
        dtype: Of the networks.
        tiny: Networks and frames of a tiny size.
    """
    console, setup, kind = Console(width=120), Setup(device, tiny), DTYPES[dtype]
    with torch.device("meta"):
        cost = counted(UNet2DConditionModel(**SD21))
    backbone, rate = setup.backbone(kind), setup.rate(kind)
    console.print(
        f"{setup.name()}: {rate / 1e12:.2g} TFLOP/s of a product; weights "
        f"{setup.weights() / 2**20:.0f} MiB"
    )
    measured(setup, backbone, Settings(steps=1, batch=batch), 2 * batch)  # what happens once
    table = Table(
        "attention", "frames", "stage", "ms", "TFLOP/s", "of the floor", "MiB beside weights",
        title="milliseconds a frame, of invert and edit also a step",
    )  # fmt: skip
    for case in cases:
        attention, frames = case.split("/")
        settings = Settings(
            steps=steps,
            batch=batch,
            keyframe_attention=attention,
            fusion=0.0,  # type: ignore[arg-type]
        )
        took, peaks = measured(setup, backbone, settings, int(frames))
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


@torch.no_grad()
def rows(
    device: str = "cuda",
    dtypes: tuple[str, ...] = ("float16", "bfloat16"),
    frames: int = 64,
    steps: int = 5,
    rounds: int = 3,
    preset_frames: int = 120,
    memory: tuple[int, ...] = (40, 120, 1000),
    tiny: bool = False,
) -> None:
    """Editing above its floor, the fast preset end to end, and memory.

    Args:
        device: Which accelerator.
        dtypes: Of the networks; the preset and memory take the first.
        frames: Of the clip that is edited, at most as many as make up one span.
        steps: Of sampling.
        rounds: How often editing is timed.
        preset_frames: Of the fast preset's clip.
        memory: Of the clips whose memory is measured.
        tiny: Networks and frames of a tiny size.
    """
    console, setup = Console(width=120), Setup(device, tiny)
    table = Table("", "measured", "times its floor", title=f"batch 8, on {setup.name()}")

    def row(*words: str) -> None:
        table.add_row(*words)
        console.print(*words)

    for name, milliseconds, above in edits(setup, dtypes, frames, steps, rounds, console):
        row(name, f"{spread(milliseconds)} ms / frame and step", spread(above))
    backbone = setup.backbone(DTYPES[dtypes[0]])
    measured(setup, backbone, Settings(steps=1), 16)
    if FAST.exists():
        seconds, _ = measured(setup, backbone, preset(FAST), preset_frames)
        row(f"fast preset, {preset_frames} frames", f"{sum(seconds.values()):.1f} s", "")
    for count in memory:
        _, peaks = measured(setup, backbone, Settings(steps=1), count)
        peak = setup.weights() + max(peaks.values())
        row(f"memory, {count} frames", f"{peak / 1e9:.2f} GB", "")
    console.print(table)


def edits(
    setup: Setup, dtypes: Sequence[str], frames: int, steps: int, rounds: int, console: Console
) -> Iterator[tuple[str, list[float], list[float]]]:
    """First and second edits of a clip: milliseconds a frame and step, and times the floor."""
    runs, floors = dict[str, Callable[[], object]](), dict[str, float]()
    for dtype in dtypes:
        backbone, rate = setup.backbone(DTYPES[dtype]), setup.rate(DTYPES[dtype])
        console.print(f"{dtype}: {rate / 1e12:.3g} TFLOP/s of a product")
        case, cache = random_case(setup, backbone, frames, steps), SourceCache()
        case.ours(backbone, cache)  # fills it, and what happens once
        names = [f"{dtype}, {which} edit" for which in ("first", "second")]
        runs[names[0]] = lambda case=case, backbone=backbone: case.ours(backbone, SourceCache())
        runs[names[1]] = partial(case.ours, backbone, cache)
        for name, second in zip(names, (False, True), strict=True):
            floors[name] = needed(backbone.unet, case.plan(backbone), second).total() / rate
    for name, times in turns(runs, rounds, console).items():
        each = [1e3 * time / frames / steps for time in times]
        yield name, each, [time / floors[name] for time in times]


def random_case(setup: Setup, backbone: StableDiffusion, frames: int, steps: int) -> Case:
    """An edit of random latents, which are not inverted."""
    height, width = (side // backbone.latent_scale for side in setup.clip(1).frames.shape[-2:])
    generator, schedule = torch.Generator().manual_seed(0), backbone.schedule(steps)
    shape = frames, backbone.latent_channels, height, width
    latents = torch.randn(steps, *shape, generator=generator)
    trajectory = Trajectory(schedule.timesteps, latents, latents[-1], latents[0])
    return Case(PROMPTS, schedule, trajectory, Settings(steps=steps).for_model(backbone))


if __name__ == "__main__":
    auto_cli([rows, stages], as_positional=False)
