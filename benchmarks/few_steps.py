"""Edits without inversion, in few steps and by a transformer beside Plug-and-Play, with their cost.

    python benchmarks/few_steps.py

prints the table of docs/miniature.md, and leaves a contact sheet for each clip: the source, what
its latents decode to, and one row of frames for each row of the table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import process_time
from typing import Any

import torch
from miniature_edits import decoded, textured, verdict
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from tokenflow.diffusion import Backbone
from tokenflow.editors import DDCM, Editor, FlowEdit, PnP
from tokenflow.engine import Settings, edit_clip
from tokenflow.engine.settings import FUSION
from tokenflow.miniature.edits import EDITOR
from tokenflow.miniature.judge import Judge
from tokenflow.propagation import NNField
from tokenflow.video import contact_sheet, write_image


@dataclass(frozen=True)
class Way:
    """An editor of a model in so many steps."""

    model: str
    editor: Editor
    steps: int
    guidance: float


CONSISTENCY: dict[str, dict[str, Any]] = {
    "per frame": {"consistency": "none"},
    "joint": {"consistency": "joint"},
    "TokenFlow": {"fusion": 0.0},
    "fused": {"fusion": FUSION},
}
"""Where settings are not the default."""


WAYS = {
    "PnP": Way("miniature", EDITOR, 15, 4.0),
    "FlowEdit": Way("miniature", FlowEdit(n_max=11, noise="shared"), 15, 4.0),
    "transformer, PnP": Way("miniature-transformer", PnP(attention=0.5, features=0.0), 15, 4.0),
    "transformer, FlowEdit": Way(
        "miniature-transformer", FlowEdit(n_max=11, noise="shared"), 15, 4.0
    ),
    "DDCM, 8 steps": Way("miniature-lcm", DDCM(noise="shared"), 8, 3.0),
    "DDCM, 4 steps": Way("miniature-lcm", DDCM(noise="shared"), 4, 3.0),
}


def main(
    folder: Path = Path("runs/few_steps"),
    frames: int = 16,
    clips: tuple[int, ...] = (0, 1, 2, 3),
    ways: tuple[str, ...] = tuple(WAYS),
    consistency: tuple[str, ...] = ("per frame", "TokenFlow", "fused"),
    dtype: str = "auto",
) -> None:
    """Edits each clip in each way and prints a table of means.

    Args:
        folder: Where contact sheets go.
        frames: Frames of a clip.
        clips: Which of the six edits of benchmarks/miniature_edits.py.
        ways: Which rows of the table.
        consistency: And in which of the ways `CONSISTENCY`.
        dtype: Of the networks.
    """
    names = dict.fromkeys(WAYS[way].model for way in ways)
    models = {name: Backbone.load(name, dtype=dtype) for name in names}
    judge, console = Judge.load(), Console(width=120)
    results: dict[str, list[tuple[float, ...]]] = {}
    for number in clips:
        edit = textured(frames)[number]
        model = models[WAYS[ways[0]].model]
        latents = torch.cat([model.encode(x) for x in edit.clip.frames.split(8)])
        shown = [edit.clip.frames, decoded(model, latents)]
        floor = verdict(edit, shown[-1], judge, 0.0)[0]
        for name in ways:
            way = WAYS[name]
            for kind in consistency:
                model = models[way.model]
                rows: list[int] = []
                counting = model.network.register_forward_pre_hook(counter(rows), with_kwargs=True)
                begin = process_time()
                result = edit_clip(
                    model, edit.clip, edit.prompts, way.editor, NNField(),
                    Settings(steps=way.steps, guidance=way.guidance, **CONSISTENCY[kind]),
                )  # fmt: skip
                seconds = process_time() - begin
                counting.remove()
                shown.append(result.clip.frames)
                error, _, _, detail, edited, kept, _ = verdict(edit, shown[-1], judge, 0.0)
                row = f"{name}, {kind}"
                results.setdefault(row, []).append(
                    (error - floor, detail, edited, kept, sum(rows) / frames, seconds / frames)
                )
                console.print(number, row, *(f"{x:.3g}" for x in results[row][-1]))
        write_image(folder / f"{edit.clip.name}.png", contact_sheet(shown))

    columns = ("error above round trip", "detail", "edited", "kept", "evaluations/frame", "s/frame")
    table = Table(title=f"{len(clips)} clips of {frames} frames; errors ×10⁻³")
    for column in ("", *columns):
        table.add_column(column, justify="right" if column else "left")
    for row, values in results.items():
        table.add_row(row, *(f"{x:.3g}" for x in torch.tensor(values).mean(dim=0).tolist()))
    console.print(table)


def counter(rows: list[int]) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Any]], None]:
    """A hook that notes how many latents enter a network."""

    def count(network: nn.Module, inputs: tuple[Tensor, ...], options: dict[str, Any]) -> None:
        rows.append(len(inputs[0] if inputs else options["hidden_states"]))

    return count


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main, as_positional=False)
