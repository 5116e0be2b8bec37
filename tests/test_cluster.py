"""A clip on two processes, by each launcher; and the scripts in configs/cluster.

SLURM's commands are stand-ins.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tokenflow.storage.cache import Cache
from tokenflow.video import Clip, read_clip

PREDICT = [sys.executable, "-m", "tokenflow.cli.main", "predict"]
JOB = ["bash", "configs/cluster/tokenflow.sbatch"]
LAUNCHERS = {
    "lightning": [*PREDICT, "--trainer.devices=2", "--trainer.strategy=ddp"],
    "torchrun": ["configs/cluster/torchrun.sh"],
    "slurm": JOB,
}
EDIT = [
    "--data.video=tokenflow/miniature/demo/blue_ball.mp4", "--data.max_frames=9",
    "--data.resolution=64", "--model.prompt=a plain purple ball on sand", "--model.steps=2",
    "--model.keyframe_every=4", "--trainer.accelerator=cpu", "--output.crf=0",
]  # fmt: skip
TASKS = """\
#!/usr/bin/env bash
# Two tasks on this machine, as srun starts them; the largest exit code.
while [ "${1#--}" != "$1" ]; do shift; done  # srun's own options
export SLURM_NTASKS=2 SLURM_NODELIST=localhost SLURM_JOB_NAME=tokenflow MASTER_ADDR=127.0.0.1
for task in 0 1; do
  SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NODEID=0 "$@" &
  tasks="${tasks:-} $!"
done
code=0
for task in $tasks; do wait "$task" || { c=$?; code=$((c > code ? c : code)); }; done
exit $code
"""


@pytest.fixture
def commands(tmp_path: Path) -> Path:
    """A folder of commands; `scontrol` notes what it is told."""
    folder = tmp_path / "bin"
    folder.mkdir()
    command(folder / "scontrol", f'#!/bin/sh\necho "$@" >> {tmp_path / "told"}\n')
    return folder


def command(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def environment(commands: Path, **more: str) -> dict[str, str]:
    path = os.pathsep.join([str(commands), str(Path(sys.executable).parent), os.environ["PATH"]])
    slurm = {"SLURM_NNODES": "1", "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_ID": "7"}
    return {**os.environ, **slurm, "PATH": path, "GPUS": "2", "OMP_NUM_THREADS": "1", **more}


def edited(folder: Path, command: list[str], env: dict[str, str]) -> Clip:
    done = subprocess.run(
        [*command, *EDIT, f"--output.folder={folder}"], cwd=ROOT, env=env, capture_output=True,
        text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("report.html") == 1  # only one rank speaks
    return read_clip(folder / "blue_ball" / "edited.mp4")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Clip:
    return edited(tmp_path_factory.mktemp("alone"), PREDICT, {**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_write_what_one_does(
    launcher: str, alone: Clip, commands: Path, tmp_path: Path
) -> None:
    command(commands / "srun", TASKS)
    both = edited(tmp_path, LAUNCHERS[launcher], environment(commands))
    assert both.times == alone.times
    # a level of rounding, and one of the conversion to YUV and back
    assert float((both.frames - alone.frames).abs().max()) <= 2.5 / 255
    assert not (tmp_path / "told").exists()


@pytest.mark.parametrize(
    ("code", "array"),
    [
        (0, {"SLURM_ARRAY_TASK_COUNT": "16"}),
        (1, {"SLURM_ARRAY_TASK_COUNT": "16"}),
        (2, {"SLURM_ARRAY_TASK_COUNT": "16"}),
        (75, {"SLURM_ARRAY_TASK_COUNT": "2", "PARTS": "16"}),
    ],
)
def test_only_a_job_that_can_go_on_is_started_again(
    commands: Path, tmp_path: Path, code: int, array: dict[str, str]
) -> None:
    command(commands / "srun", f'#!/bin/sh\necho "$@"\nexit {code}\n')
    array = {"SLURM_ARRAY_TASK_ID": "3", **array}
    done = subprocess.run(
        [*JOB, "--data.manifest=clips.yaml"], cwd=ROOT, env=environment(commands, **array),
        stdout=subprocess.PIPE, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == code
    assert done.stdout == (
        "--kill-on-bad-exit=0 --wait=0 "
        "tokenflow predict --config configs/cluster/predict.yaml --trainer.num_nodes 1 "
        "--trainer.devices 2 --data.part 3/16 --data.manifest=clips.yaml\n"
    )
    told = (tmp_path / "told").read_text() if (tmp_path / "told").exists() else ""
    assert told == ("requeue 7\n" if code == 75 else "")


def test_a_job_waits_for_its_tasks_when_it_has_the_signal_too(
    commands: Path, tmp_path: Path
) -> None:
    command(commands / "srun", "#!/bin/sh\necho started\nsleep 1\nexit 75\n")
    with subprocess.Popen(
        JOB, cwd=ROOT, env=environment(commands), stdout=subprocess.PIPE, text=True
    ) as job:
        assert job.stdout is not None
        assert job.stdout.readline() == "started\n"
        job.send_signal(signal.SIGTERM)
        assert job.wait(timeout=30) == 75
    assert (tmp_path / "told").read_text() == "requeue 7\n"


@pytest.mark.parametrize(("launcher", "code"), [("torchrun", 1), ("lightning", 75)])
def test_launchers_pass_a_schedulers_signal_on(
    launcher: str, code: int, commands: Path, tmp_path: Path
) -> None:
    cache = Cache(tmp_path / "cache")
    options = ["--model.steps=40", "--model.save_every=1000", f"--model.cache={cache.folder}"]
    with subprocess.Popen(
        [*LAUNCHERS[launcher], *EDIT, *options, f"--output.folder={tmp_path / 'runs'}"],
        cwd=ROOT, env=environment(commands), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ) as job:  # fmt: skip
        while job.poll() is None and len(cache.files()) < 9:  # until all frames are inverted
            time.sleep(0.1)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(timeout=120) == code
    assert "sampling" in {entry.kind for entry in cache.entries()}  # kept by who was asked to stop
