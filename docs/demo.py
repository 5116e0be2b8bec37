"""Makes `docs/demo.webp`, the README's looping picture, from what `make demo` left in `runs/`."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from tokenflow.video import levels, read_clip

ROOT = Path(__file__).parents[1]
SCALE = 2


def main(video: Path = ROOT / "runs/blue_ball/compare.mp4") -> None:
    """Writes source and edit, side by side, as an animated WebP of about 100 kB."""
    clip = read_clip(video)
    pictures = [Image.fromarray(levels(frame).movedim(0, -1).numpy()) for frame in clip.frames]
    first, *others = (p.resize((p.width * SCALE, p.height * SCALE)) for p in pictures)
    duration = round(1000 / clip.rate)
    first.save(
        ROOT / "docs/demo.webp", save_all=True, append_images=others, duration=duration, loop=0,
        quality=75, method=6,
    )  # fmt: skip


if __name__ == "__main__":
    main()
