"""Edits of moving scenes by every way of consistency, kernel, neighbours and blend, judged.

    python benchmarks/miniature_edits.py --steps 15

prints the tables of docs/miniature.md, with warp errors by the scenes' true flow (near occlusions
and elsewhere), and leaves a contact sheet for each edit.
"""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from jaxtyping import Bool
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import max_pool2d

from tokenflow.diffusion import Backbone, Schedule, Trajectory, invert
from tokenflow.editors import PnP
from tokenflow.engine import Settings, edit_latents
from tokenflow.engine.settings import FUSION
from tokenflow.metrics import judge_edit, warp_error
from tokenflow.miniature.edits import EDITOR, SceneEdit, SceneFlow, suite
from tokenflow.miniature.judge import Judge
from tokenflow.miniature.scenes import Attributes, Scene, random_scene
from tokenflow.propagation import DIS, ClipFlow, FlowWeighted, LatentFlow, NNField, Propagation
from tokenflow.video import contact_sheet, write_image

KERNELS = ("NNField", "FlowWeighted exact", "FlowWeighted DIS")
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "per-frame PnP": ("NNField", {"consistency": "none"}),
    "joint attention only": ("NNField", {"consistency": "joint"}),
    **{kernel: (kernel, {}) for kernel in KERNELS},
    "NNField, fused": ("NNField", {"fusion": FUSION}),
    **{f"{kernel}, previous": (kernel, {"neighbours": "previous"}) for kernel in KERNELS},
    **{f"{kernel}, linear": (kernel, {"blend": "linear"}) for kernel in KERNELS},
}
NEAR = 8
"""Pixels around what is hidden in the next frame that count as near an occlusion."""


def textured(frames: int) -> list[SceneEdit]:
    """The suite's edits, and two in which both layers are textured."""
    edits = [
        (3_000_005, "a dotted blue box on brick", "a dotted purple box on brick"),
        (3_000_006, "a checkered red ball on grass", "a checkered red ball on sand"),
    ]
    more = ((seed, Attributes.parse(a), Attributes.parse(b)) for seed, a, b in edits)
    return suite(frames) + [SceneEdit(random_scene(s, frames, a), b) for s, a, b in more]


def kernel_of(name: str, scene: Scene, **options: float) -> Propagation:
    """A kernel by its name in the tables, with its provider of flow."""
    if name == "NNField":
        return NNField()
    return FlowWeighted(SceneFlow(scene) if name.endswith("exact") else DIS(), **options)


def decoded(backbone: Backbone, latents: Tensor) -> Tensor:
    """Frames of latents, in host memory."""
    return torch.cat([backbone.decode(x).cpu() for x in latents.split(8)])


def inverted(
    backbone: Backbone, edit: SceneEdit, steps: int
) -> tuple[Schedule, Trajectory, Tensor]:
    """The schedule, the source's trajectory, and the frames that its latents decode to."""
    schedule = backbone.schedule(steps)
    latents = torch.cat([backbone.encode(x) for x in edit.clip.frames.split(8)])
    source = str(edit.scene.attributes)
    return schedule, invert(backbone, latents, source, schedule, steps), decoded(backbone, latents)


def main(
    folder: Path = Path("runs/miniature_edits"),
    steps: int = 25,
    guidance: float = 4.0,
    attention: float = EDITOR.attention,
    features: float = EDITOR.features,
    feature_layers: int = EDITOR.feature_layers,
    frames: int = 24,
    keyframe_every: int = 8,
    rows: tuple[str, ...] = tuple(ROWS),
    clips: tuple[int, ...] = (0, 1, 2, 3, 4, 5),
    inconsistency: float | None = None,
    disagreement: float | None = None,
    dtype: str = "float32",
    seed: int = 0,
) -> None:
    """Edits each clip in each way and prints a table of means.

    Args:
        folder: Where contact sheets go.
        steps: Sampling and inversion steps.
        guidance: Scale of classifier-free guidance.
        attention: PnP's threshold for queries and keys.
        features: PnP's threshold for features.
        feature_layers: How many decoder layers take them.
        frames: Frames of a clip.
        keyframe_every: Frames in a window.
        rows: Which ways to compare.
        clips: Which of the six edits; the last two are textured all over.
        inconsistency: FlowWeighted's, if not its default.
        disagreement: FlowWeighted's, if not its default.
        dtype: Of the networks.
        seed: Of the keyframes.
    """
    given = {"inconsistency": inconsistency, "disagreement": disagreement}
    options = {name: value for name, value in given.items() if value is not None}
    backbone, judge, console = (
        Backbone.load("miniature", dtype=dtype),
        Judge.load(),
        Console(width=120),
    )
    editor = PnP(attention, features, feature_layers)
    results: dict[str, list[tuple[float, ...]]] = {}
    for number in clips:
        edit = textured(frames)[number]
        schedule, trajectory, back = inverted(backbone, edit, steps)
        shown = [edit.clip.frames, back]
        results.setdefault("VAE round trip", []).append(verdict(edit, back, judge, 0.0))
        for row in rows:
            name, choice = ROWS[row]
            kernel = kernel_of(name, edit.scene, **options)
            flow = None
            if kernel.flow is not None:
                flow = ClipFlow(edit.clip, kernel.flow, backbone.latent_scale)
            elif "fusion" in choice:
                flow = LatentFlow(edit.clip, backbone.latent_scale)
            settings = Settings(
                steps=steps,
                guidance=guidance,
                keyframe_every=keyframe_every,
                seed=seed,
                **{"fusion": 0.0, **choice},
            )
            begin = perf_counter()
            edited = edit_latents(
                backbone, trajectory, schedule, edit.prompts, editor, kernel, settings, flow=flow,
            )  # fmt: skip
            seconds = (perf_counter() - begin) / frames
            shown.append(decoded(backbone, edited))
            results.setdefault(row, []).append(verdict(edit, shown[-1], judge, seconds))
            console.print(number, row, *(f"{x:.3g}" for x in results[row][-1]))
        write_image(folder / f"{edit.clip.name}.png", contact_sheet(shown))

    columns = ("warp error", "near occlusion", "elsewhere", "detail", "edited", "kept", "s/frame")
    table = Table(title=f"{len(clips)} clips of {frames} frames, {steps} steps; errors ×10⁻³")
    for column in ("", *columns):
        table.add_column(column, justify="right" if column else "left")
    for row, values in results.items():
        table.add_row(row, *(f"{x:.3g}" for x in torch.tensor(values).mean(dim=0).tolist()))
    console.print(table)


def verdict(edit: SceneEdit, frames: Tensor, judge: Judge, seconds: float) -> tuple[float, ...]:
    """One row of the table; detail is the mean step between pixels, which blur would lower."""
    flow, visible = edit.motion
    near = near_occlusion(visible)
    errors = (warp_error(frames, flow, part) for part in (visible & near, visible & ~near))
    detail = float(frames.diff(dim=-1).abs().mean() + frames.diff(dim=-2).abs().mean())
    judged = judge_edit(edit, frames, judge)
    thousandths = (1e3 * x for x in (judged.warp_error, *errors, detail))
    return *thousandths, judged.edited, judged.kept, seconds


def near_occlusion(visible: Bool[Tensor, "pairs h w"]) -> Bool[Tensor, "pairs h w"]:
    """Pixels within `NEAR` of one that is hidden in the next frame."""
    return max_pool2d((~visible).float(), 2 * NEAR + 1, stride=1, padding=NEAR) > 0


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main, as_positional=False)
