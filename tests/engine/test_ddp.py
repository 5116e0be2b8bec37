"""The command line on two processes, by Lightning's own launcher and by torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tokenflow.video import Clip, read_clip

PREDICT = [
    "-m", "tokenflow.cli", "predict", "--data.video=tokenflow/miniature/demo/blue_ball.mp4",
    "--model.prompt=a plain purple ball on sand", "--model.steps=2", "--data.max_frames=9",
    "--data.resolution=64", "--model.keyframe_every=4", "--output.crf=0",
    "--trainer.accelerator=cpu",
]  # fmt: skip
TWO = ["--trainer.devices=2", "--trainer.strategy=ddp"]
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]


def edited(folder: Path, *words: str) -> Clip:
    done = subprocess.run(
        [sys.executable, *words, f"--output.folder={folder}"],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("edited.mp4") == 1  # only one rank speaks
    return read_clip(folder / "blue_ball" / "edited.mp4")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Clip:
    return edited(tmp_path_factory.mktemp("alone"), *PREDICT)


@pytest.mark.parametrize("launcher", [[], TORCHRUN], ids=["lightning", "torchrun"])
def test_two_processes_write_what_one_does(
    launcher: list[str], alone: Clip, tmp_path: Path
) -> None:
    both = edited(tmp_path, *launcher, *PREDICT, *TWO)
    assert both.times == alone.times
    # a level of rounding, and one of the conversion to YUV and back
    assert float((both.frames - alone.frames).abs().max()) <= 2.5 / 255
