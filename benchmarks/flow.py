"""Optical flow of the latents against the scenes' exact flow; nothing is edited.

    python -m benchmarks.flow

prints how far two ways to find it are from the truth, and what they cost, in two minutes.
"""

from __future__ import annotations

from statistics import mean
from time import process_time

import torch
from rich.console import Console
from rich.table import Table
from torch.nn.functional import interpolate

from benchmarks.scenes.suite import cases
from tokenflow.miniature.edits import SceneFlow
from tokenflow.propagation import DIS, ClipFlow, LatentFlow
from tokenflow.propagation.flow.base import inside
from tokenflow.video import Clip

SCALE = 4  # pixels of the scenes' frames in a latent pixel
WAYS = {
    "DIS on each pair": lambda clip, scale: ClipFlow(clip, DIS(), scale),
    "LatentFlow": LatentFlow,
}
SEEN = 0.25  # latent pixels that the way there and back may miss where both frames show a point
OFF = 0.5  # latent pixels from which flow is wrong


def main(
    clips: tuple[int, ...] = tuple(range(35)),
    frames: int = 16,
    apart: tuple[int, ...] = (1, 2, 4, 8, 15),
    enlarged: int = 4,
) -> None:
    """Prints the error by distance, and the time of all pairs of a frame and the next 15.

    Args:
        clips: Which of the benchmark's suite.
        frames: Of a clip.
        apart: Distances between frames.
        enlarged: By how much frames are enlarged for the time, to Stable Diffusion's 512×512, with
            8 pixels in a latent pixel.
    """
    torch.set_num_threads(1)
    table = Table("mean error / off", *(f"{distance} apart" for distance in apart), "s / frame")
    found: dict[str, list[list[tuple[float, float]]]] = {name: [] for name in WAYS}
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for number in clips:
        edit = cases()[number].of(frames)
        true = ClipFlow(edit.clip, SceneFlow(edit.scene), SCALE)
        for name, way in WAYS.items():
            flow = way(edit.clip, SCALE)
            found[name].append([errors(flow, true, frames, distance) for distance in apart])
        if number % 5 == 0:  # one clip of each motion
            size = [enlarged * side for side in edit.clip.frames.shape[-2:]]
            large = Clip.from_frames(interpolate(edit.clip.frames[:], size, mode="bilinear"))
            for name, way in WAYS.items():
                begin, flow = process_time(), way(large, 2 * SCALE)
                for start in range(frames):
                    for end in range(start + 1, min(start + 16, frames)):
                        flow.between(start, end)
                seconds[name].append((process_time() - begin) / frames)
    for name, rows in found.items():
        columns = [
            [mean(one) for one in zip(*column, strict=True)] for column in zip(*rows, strict=True)
        ]
        table.add_row(
            name, *(f"{error:.2f} / {off:.0%}" for error, off in columns),
            f"{mean(seconds[name]):.3f}" if seconds[name] else "",
        )  # fmt: skip
    Console(width=120).print(table)


def errors(flow: ClipFlow, true: ClipFlow, frames: int, apart: int) -> tuple[float, float]:
    """The mean distance from the truth, in latent pixels, and the share that is off."""
    distances = []
    for start in range(frames - apart):
        for one, exact in zip(
            flow.between(start, start + apart), true.between(start, start + apart), strict=True
        ):
            seen = (exact[2] < SEEN) & (inside(exact[:2]) > 0)
            distances.append((one - exact)[:2].norm(dim=0)[seen])
    distance = torch.cat(distances)
    return float(distance.mean()), float((distance > OFF).float().mean())


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main, as_positional=False)
