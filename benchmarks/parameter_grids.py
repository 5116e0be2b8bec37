"""The pictures of docs/parameters.md: one edit of a miniature clip, again and again, by one option.

    python benchmarks/parameter_grids.py

Each row has frames of the clip and, last, the middle pixel row of all frames, from the first at the
top to the last; it prints each row's warp error by the scene's true flow. Some are made by
--grids '[controlnet, propagation]'.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from tokenflow.diffusion import Backbone, invert
from tokenflow.editors import ControlNet, Editor, PnP, SDEdit
from tokenflow.engine import Settings, edit_latents
from tokenflow.metrics import warp_error
from tokenflow.miniature.edits import EDITOR, suite
from tokenflow.propagation import ClipFlow, FlowWeighted, NNField, Propagation
from tokenflow.storage.atomic import atomic
from tokenflow.video import contact_sheet, levels

Frames = Float[Tensor, "frames 3 h w"]
CELL, LABEL, COLORS = 96, 150, 96  # pixels, pixels, and of the palette without the labels
BASE = Settings(guidance=3.0, keyframe_every=4, fusion=0.0)
AMPLIFIED = 4


@dataclass(frozen=True)
class Row:
    """One edit of a grid."""

    label: str
    editor: Editor = EDITOR
    settings: Settings = BASE
    kernel: Propagation = field(default_factory=NNField)


@dataclass(frozen=True)
class Grid:
    """Edits of the scene with this number in the miniature's suite.

    With `differences` how all but the first differ from that one is shown too, amplified.
    """

    scene: int
    rows: tuple[Row, ...]
    differences: bool = False


def with_pnp(features: float, attention: float) -> Row:
    label = f"features {features}\nattention {attention}"
    return Row(label, PnP(attention, features, feature_layers=5))


GRIDS = {
    "pnp": Grid(0, tuple(with_pnp(*x) for x in ((0, 0), (0.3, 0), (0.3, 0.5), (0.8, 0.8)))),
    "strength": Grid(0, tuple(Row(f"strength {x}", SDEdit(x)) for x in (0.3, 0.5, 0.7, 0.9))),
    "guidance": Grid(
        2, tuple(Row(f"guidance {x}", settings=replace(BASE, guidance=x)) for x in (1, 3, 7.5, 15))
    ),
    "consistency": Grid(
        1,
        (
            *(
                Row(f"consistency\n{x}", settings=replace(BASE, consistency=x))
                for x in ("none", "joint")
            ),
            *(
                Row(f"tokenflow\nkeyframe_every {x}", settings=replace(BASE, keyframe_every=x))
                for x in (2, 4, 8)
            ),
        ),
    ),
    "controlnet": Grid(
        1,
        tuple(
            Row(f"scale {x}", ControlNet(scale=x, noise="independent"))
            for x in (0, 0.25, 0.5, 1, 2)
        ),
    ),
    "propagation": Grid(
        0,
        (
            Row("NNField"),
            Row("FlowWeighted", kernel=FlowWeighted()),
            Row("neighbours\nprevious", settings=replace(BASE, neighbours="previous")),
            Row("blend\nlinear", settings=replace(BASE, blend="linear")),
        ),
        differences=True,
    ),
}


def main(
    folder: Path = Path("docs"),
    steps: int = 10,
    frames: int = 8,
    grids: tuple[str, ...] = tuple(GRIDS),
) -> None:
    """Edits and writes `parameters-NAME.webp` for each grid.

    Args:
        folder: Where pictures go.
        steps: Sampling and inversion steps.
        frames: Frames of a clip.
        grids: Which ones.
    """
    backbone = Backbone.load("miniature", dtype="float32")
    schedule = backbone.schedule(steps)
    for name in grids:
        edit = suite(frames)[GRIDS[name].scene]
        source, target = str(edit.scene.attributes), str(edit.target)
        print(f"{name}: from {source!r} to {target!r}", flush=True)
        latents = backbone.encode(edit.clip.frames)
        trajectory = invert(backbone, latents, source, schedule, steps)
        shown = [("source", edit.clip.frames)]
        for row in GRIDS[name].rows:
            row.editor.prepare(backbone, edit.clip)
            provider = row.kernel.flow
            edited = edit_latents(
                backbone, trajectory, schedule, edit.prompts, row.editor, row.kernel,
                replace(row.settings, steps=steps),
                flow=provider and ClipFlow(edit.clip, provider, backbone.latent_scale),
            )  # fmt: skip
            shown.append((row.label, backbone.decode(edited).cpu()))
            error = 1e3 * warp_error(shown[-1][1], *edit.motion)
            print(f"  {' '.join(row.label.split())}: warp error {error:.2f}e-3", flush=True)
        if GRIDS[name].differences:
            shown += differences(shown[1:])
        with atomic(folder / f"parameters-{name}.webp") as file:
            labelled(shown).save(file, format="WEBP", lossless=True)


def differences(edits: list[tuple[str, Frames]]) -> list[tuple[str, Frames]]:
    """How far each edit after the first is from that one, amplified, with a label."""
    (_, first), *others = edits
    return [
        (f"{' '.join(label.split())}\ndifference x {AMPLIFIED}", AMPLIFIED * (frames - first).abs())
        for label, frames in others
    ]


def labelled(rows: list[tuple[str, Frames]]) -> Image.Image:
    """Rows of four frames and the slice through time, with their labels at the left."""
    sheet = contact_sheet([with_slice(frames) for _, frames in rows], size=(CELL, CELL))
    pictures = Image.fromarray(levels(sheet).movedim(0, -1).numpy()).quantize(COLORS)
    page = Image.new("RGBA", (LABEL + pictures.width, pictures.height))
    page.paste(pictures.convert("RGB"), (LABEL, 0))
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(15)
    for number, (label, _) in enumerate(rows):
        middle = number * pictures.height // len(rows) + CELL // 2
        draw.text((6, middle), label, fill="gray", font=font, anchor="lm")
    return page


def with_slice(frames: Frames) -> Float[Tensor, "5 3 h w"]:
    """Four of the frames, and the middle pixel row of all of them over time."""
    height = frames.shape[-2]
    moments = torch.arange(height) * len(frames) // height  # each frame's row, many times
    over_time = frames[moments, :, height // 2].movedim(0, 1)
    chosen = torch.linspace(0, len(frames) - 1, 4).round().long()
    return torch.cat([frames[chosen], over_time[None]])


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main, as_positional=False)
