"""Peak memory of the way from a long video's file to the files of its run.

    python benchmarks/streaming.py

makes 1080p videos of 1 and of 10 minutes and takes each, in a process of its own, through reading,
hashing, a decoder that gives back what it is given, and the writer: all but the networks, whose
memory does not depend on the clip's length. Takes half an hour and 10 GB of temporary disk.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import av
import torch
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table

SIZE, RATE = (1080, 1920), 10  # height and width in pixels; frames per second


def make(path: Path, frames: int) -> None:
    """A video in which noise moves, quickly encoded."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 68, 120, generator=generator)
    noise = torch.nn.functional.interpolate(coarse, SIZE, mode="bilinear")[0]
    picture = (255 * noise).byte().permute(1, 2, 0)
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=RATE, options={"preset": "ultrafast"})
        stream.height, stream.width = SIZE
        for number in range(frames):
            image = av.VideoFrame.from_ndarray(picture.roll(3 * number, dims=1).numpy(), "rgb24")
            output.mux(stream.encode(image))
        output.mux(stream.encode(None))


def through(path: Path, folder: Path, resolution: int) -> None:
    """What a run does with frames, and the process's peak memory before and after."""
    from tokenflow.engine.lightning.job import ClipSource
    from tokenflow.engine.resume import frame_digests
    from tokenflow.video import FrameBuffer, contact_sheet, side_by_side, write_image, write_video

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9

    before, begin = peak(), perf_counter()
    source = ClipSource(path, resolution=resolution).read(64)
    frame_digests(source)
    height, width = source.frames.shape[-2:]
    buffer = FrameBuffer((height, width))
    for part in torch.arange(len(source)).split(8):
        buffer.extend(source.frames[part])
    edited = buffer.frames
    write_video(folder / "edited.mp4", edited, source.times, source.rate)
    both = map(side_by_side, source.frames, edited)
    write_video(folder / "compare.mp4", both, source.times, source.rate)
    write_image(folder / "sheet.png", contact_sheet([source.frames, edited]))
    whole = 4 * source.frames.shape.numel() / 1e9
    print(len(source), whole, before, peak(), perf_counter() - begin)


def main(
    minutes: tuple[float, ...] = (1, 10), resolution: int = 256, clip: Path | None = None
) -> None:
    """Peak memory by length.

    Args:
        minutes: How long the videos are.
        resolution: Pixels of the shorter side, to which frames are scaled as they are read.
        clip: The one to take through, in the processes that this one starts.
    """
    if clip is not None:
        through(clip, clip.parent, resolution)
        return
    table = Table(
        "minutes", "frames", "decoded frames, GB", "peak memory, GB", "of it before, GB",
        "ms a frame",
        title=f"1080p at {RATE} frames a second, edited at {resolution} pixels",
    )  # fmt: skip
    for length in minutes:
        with TemporaryDirectory() as folder:
            path = Path(folder) / "clip.mp4"
            make(path, round(60 * RATE * length))
            command = [sys.executable, __file__, f"--clip={path}", f"--resolution={resolution}"]
            said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        frames, whole, before, after, seconds = map(float, said.split())
        row = f"{whole:.1f}", f"{after:.2f}", f"{before:.2f}", f"{1000 * seconds / frames:.0f}"
        table.add_row(f"{length:g}", f"{frames:.0f}", *row)
    Console(width=120).print(table)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
