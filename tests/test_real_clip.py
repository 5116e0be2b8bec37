"""A real H.264 clip through the whole command line, with the embedded model."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import torch

from tokenflow.cli.main import main
from tokenflow.video import read_clip


def test_a_real_clip_keeps_its_frames_timing_and_colours(real_video: Path, tmp_path: Path) -> None:
    main(
        [
            "predict",
            f"--data.video={real_video}",
            "--data.resolution=128",
            "--data.start=8",
            "--data.stop=24",
            "--data.stride=2",
            "--model.prompt=a plain blue ball on sand",
            "--model.steps=2",
            "--model.keyframe_every=4",
            f"--output.folder={tmp_path}",
            "--trainer.accelerator=cpu",
        ]
    )
    run = tmp_path / real_video.stem
    edited, compare = read_clip(run / "edited.mp4"), read_clip(run / "compare.mp4")
    source = read_clip(real_video, start=8, stop=24, stride=2, resolution=128)

    assert edited.frames.shape == source.frames.shape == (8, 3, 128, 128)
    with av.open(str(real_video)) as container:
        pts = [f.pts * f.time_base for f in container.decode(video=0)][8:24:2]  # type: ignore[operator]
    assert edited.times == tuple(Fraction(t - pts[0]) for t in pts)
    assert not torch.allclose(edited.frames, source.frames, atol=0.05)
    assert edited.frames.std() > 0.01, "the output is blank"

    # the left half shows the source: x264 at crf 16 and 4:2:0 chroma keep 30 dB by far,
    # while a wrong matrix or range shifts saturated colours by 0.05 on the average
    left = compare.frames[..., :128]
    assert (left - source.frames).abs().mean() < 0.02
    assert (left.mean(dim=(0, 2, 3)) - source.frames.mean(dim=(0, 2, 3))).abs().max() < 0.01
    with av.open(str(run / "edited.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert (context.colorspace, context.color_primaries, context.color_trc) == (1, 1, 1)
        assert context.color_range == 1  # limited, as players expect
