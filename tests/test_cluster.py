"""A clip on two processes, by each launcher; and the scripts in configs/cluster.

SLURM's commands are stand-ins.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tokenflow.cli.main import main
from tokenflow.storage.cache import Cache
from tokenflow.testing import tiny_clip
from tokenflow.video import read_clip, write_clip

LIGHTNING = [
    sys.executable, "-m", "tokenflow.cli.main", "predict", "--trainer.devices=2",
    "--trainer.strategy=ddp",
]  # fmt: skip
TORCHRUN = ["configs/cluster/torchrun.sh"]
JOB = ["bash", "configs/cluster/tokenflow.sbatch"]
PATIENCE = 60
"""Seconds in which all processes must have ended."""


def environment(commands: Path, **more: str) -> dict[str, str]:
    path = os.pathsep.join([str(commands), str(Path(sys.executable).parent), os.environ["PATH"]])
    slurm = {"SLURM_NNODES": "1", "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_ID": "7"}
    return {**os.environ, **slurm, "PATH": path, "GPUS": "2", "OMP_NUM_THREADS": "1", **more}


@pytest.fixture
def edit(model_folder: Path, tmp_path: Path) -> list[str]:
    """What follows a launcher; 16 steps leave time to interrupt them."""
    video = write_clip(tmp_path / "clip.mp4", tiny_clip(9))
    return [
        f"--data.video={video}", "--data.resolution=16", "--model.prompt=a ball",
        f"--model.backbone={model_folder}", "--model.steps=16", "--model.keyframe_every=4",
        "--model.save_every=1000", f"--model.cache={tmp_path / 'cache'}",
        f"--output.folder={tmp_path / 'runs'}", "--trainer.accelerator=cpu", "--output.crf=0",
    ]  # fmt: skip


@contextmanager
def sampling(command: list[str], folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A command that has inverted all frames, and samples."""
    cache = Cache(folder / "cache")
    with (folder / "said").open("wb") as said, subprocess.Popen(
        command, cwd=ROOT, env=environment(folder), stdout=said, stderr=said
    ) as job:  # fmt: skip
        try:
            while job.poll() is None and len(cache.files()) < 9:
                time.sleep(0.1)
            yield job
        finally:
            job.kill()


def children(process: int) -> list[int]:
    """The processes that a process has started."""
    return list(map(int, Path(f"/proc/{process}/task/{process}/children").read_text().split()))


def running(process: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return False


def kinds(folder: Path) -> set[str]:
    return {entry.kind for entry in Cache(folder / "cache").entries()}


@pytest.mark.full
def test_lightnings_launcher_stops_and_resumes(edit: list[str], tmp_path: Path) -> None:
    with sampling([*LIGHTNING, *edit], tmp_path) as job:
        job.send_signal(signal.SIGUSR1)
        assert job.wait(PATIENCE) == 75
    assert "sampling" in kinds(tmp_path)
    done = subprocess.run(
        [*LIGHTNING, *edit], cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("report.html") == 1  # only one rank prints
    both = read_clip(tmp_path / "runs" / "clip" / "edited.mp4")

    main(["predict", *edit, f"--output.folder={tmp_path / 'alone'}", "--model.cache=null"])
    alone = read_clip(tmp_path / "alone" / "clip" / "edited.mp4")
    assert both.times == alone.times
    # a level of rounding, and one of the conversion to YUV and back
    assert float((both.frames - alone.frames).abs().max()) <= 2.5 / 255


@pytest.mark.full
def test_ranks_end_when_lightnings_launcher_is_killed(edit: list[str], tmp_path: Path) -> None:
    with sampling([*LIGHTNING, *edit], tmp_path) as job:
        [child] = [one for one in children(job.pid) if running(one)]
        job.kill()
        end = time.monotonic() + PATIENCE
        while running(child) and time.monotonic() < end:
            time.sleep(0.1)
        assert not running(child), (tmp_path / "said").read_text()
    assert not list(tmp_path.glob("runs/*/run.yaml"))


@pytest.mark.full
def test_torchrun_passes_a_signal_on(edit: list[str], tmp_path: Path) -> None:
    with sampling([*TORCHRUN, *edit], tmp_path) as job:
        job.send_signal(signal.SIGUSR1)
        assert job.wait(PATIENCE) == 1  # whatever its processes' is
    assert "sampling" in kinds(tmp_path)


def stand_in(folder: Path, name: str, text: str) -> None:
    """Puts a command into a folder."""
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def commands(tmp_path: Path) -> Path:
    """A folder of commands; `scontrol` notes its arguments."""
    stand_in(tmp_path, "scontrol", f'echo "$@" >> {tmp_path / "noted"}')
    return tmp_path


@pytest.mark.parametrize(
    ("code", "array"),
    [
        (0, {"SLURM_ARRAY_TASK_COUNT": "16"}),
        (1, {"SLURM_ARRAY_TASK_COUNT": "16"}),
        (2, {"SLURM_ARRAY_TASK_COUNT": "16"}),
        (75, {"SLURM_ARRAY_TASK_COUNT": "2", "PARTS": "16"}),
    ],
)
def test_only_a_job_that_can_be_resumed_is_started_again(
    commands: Path, code: int, array: dict[str, str]
) -> None:
    stand_in(commands, "srun", f'echo "$@"\nexit {code}')
    array = {"SLURM_ARRAY_TASK_ID": "3", **array}
    done = subprocess.run(
        [*JOB, "--data.manifest=clips.yaml"], cwd=ROOT, env=environment(commands, **array),
        stdout=subprocess.PIPE, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == code
    assert done.stdout == (
        "--kill-on-bad-exit=1 "
        "tokenflow predict --config configs/cluster/predict.yaml --trainer.num_nodes 1 "
        "--trainer.devices 2 --data.part 3/16 --data.manifest=clips.yaml\n"
    )
    noted = (commands / "noted").read_text() if (commands / "noted").exists() else ""
    assert noted == ("requeue 7\n" if code == 75 else "")


def test_a_job_waits_for_its_tasks_when_it_has_the_signal_too(commands: Path) -> None:
    stand_in(commands, "srun", "echo started\nsleep 1\nexit 75")
    with subprocess.Popen(
        JOB, cwd=ROOT, env=environment(commands), stdout=subprocess.PIPE, text=True
    ) as job:
        assert job.stdout is not None
        assert job.stdout.readline() == "started\n"
        job.send_signal(signal.SIGTERM)
        assert job.wait(timeout=PATIENCE) == 75
    assert (commands / "noted").read_text() == "requeue 7\n"
