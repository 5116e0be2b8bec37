"""Makes `docs/demo.webp`, the README's looping picture, from two runs of the demo's clip.

The first is `make demo`'s; the second edits by the transformer, as docs/miniature.md says.
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from tokenflow.video import levels, read_clip

ROOT = Path(__file__).parents[1]
SCALE, GAP = 2, 4


def main(
    videos: tuple[Path, ...] = (
        ROOT / "runs/blue_ball/compare.mp4",
        ROOT / "runs/transformer/blue_ball/compare.mp4",
    ),
) -> None:
    """Writes source and edit, side by side, a row for each run, as an animated WebP."""
    clips = [read_clip(video) for video in videos]
    gap = torch.ones(len(clips[0]), 3, GAP, clips[0].frames.shape[-1])
    rows = [part for clip in clips for part in (gap, clip.frames)][1:]
    frames = torch.cat(rows, dim=2)
    pictures = [Image.fromarray(levels(frame).movedim(0, -1).numpy()) for frame in frames]
    first, *others = (p.resize((p.width * SCALE, p.height * SCALE)) for p in pictures)
    duration = round(1000 / clips[0].rate)
    first.save(
        ROOT / "docs/demo.webp", save_all=True, append_images=others, duration=duration, loop=0,
        quality=75, method=6,
    )  # fmt: skip


if __name__ == "__main__":
    main()
