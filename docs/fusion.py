"""Makes `docs/fusion.webp`, docs/method.md's looping picture: three ways to edit, side by side."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from tokenflow.diffusion import Backbone, invert
from tokenflow.engine import Settings, edit_latents
from tokenflow.miniature.edits import EDITOR, suite
from tokenflow.propagation import LatentFlow, NNField
from tokenflow.video import levels

ROOT = Path(__file__).parents[1]
SCALE, BETWEEN = 2, 4
WAYS = {"consistency": "none"}, {"fusion": 0.0}, {}


@torch.no_grad()
def main(number: int = 1, frames: int = 16, steps: int = 15) -> None:
    """Edits one of the judged clips in three ways, and writes them side by side."""
    model, edit = Backbone.load("miniature", "cpu", "bfloat16"), suite(frames)[number]
    schedule, flow = model.schedule(steps), LatentFlow(edit.clip, model.latent_scale)
    codes = torch.cat([model.encode(x).cpu() for x in edit.clip.frames.split(8)])
    trajectory = invert(model, codes, edit.prompts.inversion_prompt, schedule, steps)
    shown = [edit.clip.frames]
    for way in WAYS:
        settings = Settings(steps=steps, guidance=4.0, **way)
        latents = edit_latents(
            model, trajectory, schedule, edit.prompts, EDITOR, NNField(), settings, flow=flow
        )
        shown.append(torch.cat([model.decode(x).cpu() for x in latents.split(8)]))
    white = torch.ones(frames, 3, shown[0].shape[-2], BETWEEN // SCALE)
    side_by_side = torch.cat([part for one in shown for part in (one, white)][:-1], dim=-1)
    first, *others = (
        picture.resize((picture.width * SCALE, picture.height * SCALE))
        for picture in (
            Image.fromarray(levels(frame).movedim(0, -1).contiguous().numpy())
            for frame in side_by_side
        )
    )
    first.save(
        ROOT / "docs/fusion.webp", save_all=True, append_images=others, duration=125, loop=0,
        quality=75, method=6,
    )  # fmt: skip


if __name__ == "__main__":
    main()
