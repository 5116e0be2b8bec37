"""Judges the miniature on held-out seeds: `python -m training.evaluate`."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

import torch
from diffusers import LatentConsistencyModelPipeline
from jaxtyping import Float
from jsonargparse.typing import PositiveInt
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tokenflow.diffusion import Backbone
from tokenflow.diffusion.text_to_image import text_to_image
from tokenflow.editors import ControlNet, SDEdit
from tokenflow.metrics import psnr
from tokenflow.miniature.judge import Judge, accuracy
from tokenflow.miniature.scenes import SIZE, VOCABULARY, random_scene
from tokenflow.video import contact_sheet, write_image
from training.control import OVERLAP_BAR, SHAPE_BAR, judge_control

HELD_OUT = 1_000_000
BAR = {"background": 0.90, "color": 0.85, "shape": 0.80, "pattern": 0.65}
FEW_STEP_BAR = {"background": 0.85, "color": 0.80, "shape": 0.70, "pattern": 0.55}


@torch.inference_mode()
def round_trip_psnr(backbone: Backbone, images: Float[Tensor, "n 3 h w"]) -> float:
    """Mean over images of the PSNR in dB of encoding and decoding."""
    back = torch.cat([backbone.decode(backbone.encode(part)) for part in images.split(16)])
    return mean(psnr(*pair) for pair in zip(back, images, strict=True))


def few_step_images(
    model: str, prompts: list[str], steps: int, guidance: float, seed: int
) -> Float[Tensor, "n 3 height width"]:
    """One image in 0..1 for each prompt, by diffusers' sampler of latent consistency models."""
    pipe = LatentConsistencyModelPipeline.from_pretrained(model, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        prompts,
        num_inference_steps=steps,
        guidance_scale=guidance,
        height=SIZE,
        width=SIZE,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
    ).images


def main(
    samples: PositiveInt = 192,
    steps: int = 50,
    guidance: float = 3.0,
    model: str = "miniature",
    few_step: bool = False,
    picture: Path | None = None,
) -> None:
    """Prints samples judged, beside renders, and for the miniature what its ControlNet gives.

    Args:
        samples: How many held-out captions and renders.
        steps: Sampling steps.
        guidance: Scale of classifier-free guidance.
        model: Which model to judge.
        few_step: Whether it is a folder of a latent consistency model.
        picture: Where to write the first 24 samples, a PNG.
    """
    judge = Judge.load()
    backbone = None if few_step else Backbone.load(model, dtype="float32")
    scenes = [random_scene(HELD_OUT + i) for i in range(samples)]
    shown = [scene.attributes for scene in scenes]
    captions = [str(attributes) for attributes in shown]
    renders = torch.stack([scene.frame(0) for scene in scenes])
    batches = [(captions[i : i + 16], steps, guidance, HELD_OUT + i) for i in range(0, samples, 16)]
    images = torch.cat(
        [
            few_step_images(model, *batch) if backbone is None else text_to_image(backbone, *batch)
            for batch in batches
        ]
    ).cpu()

    if picture is not None:
        write_image(picture, contact_sheet(images[:24].split(8)))
    table = Table(title=f"{samples} held-out seeds, {steps} steps, guidance {guidance:g}")
    for column in ("", "renders judged right", "samples judged right", "bar for samples"):
        table.add_column(column, justify="left" if not column else "right")
    on_renders, on_samples = accuracy(judge, renders, shown), accuracy(judge, images, shown)
    bar = FEW_STEP_BAR if few_step else BAR
    for name in VOCABULARY:
        table.add_row(
            name, f"{on_renders[name]:.1%}", f"{on_samples[name]:.1%}", f"{bar[name]:.0%}"
        )
    console = Console()
    console.print(table)
    if backbone is not None:
        console.print(f"VAE round trip: {round_trip_psnr(backbone, renders):.2f} dB (bar 28)")
    if backbone is not None and model == "miniature":
        console.print(structure_table(backbone, judge, max(1, samples // 8), steps, guidance))


def structure_table(
    backbone: Backbone, judge: Judge, each: int, steps: int, guidance: float
) -> Table:
    """Shapes and masks of samples with the embedded ControlNet and without."""
    table = Table(title=f"structure from edges alone, prompts without the shape, {4 * each} stills")
    for column in ("", "shape judged right", "mask IoU"):
        table.add_column(column, justify="left" if not column else "right")
    for name, editor in (("with the ControlNet", ControlNet()), ("without", SDEdit())):
        found = judge_control(backbone, editor, judge, each, steps, guidance)
        table.add_row(name, f"{found.shape:.1%}", f"{found.overlap:.2f}")
    table.add_row("bar", f"{SHAPE_BAR:.0%}", f"{OVERLAP_BAR:.2f}")
    return table


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main, as_positional=False)
