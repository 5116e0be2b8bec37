import os
import pty
import sys
from contextlib import suppress
from pathlib import Path
from threading import Thread

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment

from tokenflow.editors import PnP
from tokenflow.engine.lightning import progress
from tokenflow.engine.lightning.job import ClipSource, Job
from tokenflow.engine.lightning.module import TokenFlow
from tokenflow.engine.lightning.progress import StageProgress, pace
from tokenflow.propagation import NNField


def module_of() -> TokenFlow:
    return TokenFlow(PnP(), NNField(), cache=None)


def test_without_a_terminal_lines_tell_stage_step_and_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter(range(0, 1000, 10))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(now)))
    shown, module = StageProgress(interval=15.0), module_of()
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    shown.on_predict_start(trainer, module)
    for step in range(1, 6):
        module.progress("edit", step, 5)
    shown.on_predict_end(trainer, module)
    assert capsys.readouterr().err.splitlines() == [
        "edit: 3/5, 10.0 s each, 0:00:20 left",
        "edit: 5/5, 10.0 s each, 0:00:00 left",
    ]


def test_a_stage_that_goes_on_where_it_stopped_tells_its_own_pace(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter(range(0, 1000, 10))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(now)))
    shown = StageProgress(interval=0.0)
    for step in (31, 32, 33):
        shown.update("edit", step, 50)
    assert capsys.readouterr().err.splitlines()[1:] == [
        "edit: 32/50, 10.0 s each, 0:03:00 left",
        "edit: 33/50, 10.0 s each, 0:02:50 left",
    ]


def test_while_a_clip_is_inverted_its_edits_time_is_foretold(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter(range(0, 1000, 10))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(now)))
    shown, trainer = StageProgress(interval=0.0), Trainer(accelerator="cpu", logger=False)
    job = Job(ClipSource(Path("in.mp4")))
    for settings in ({"steps": 4, "keyframe_every": 2}, {"steps": 4, "consistency": "none"}):
        module = TokenFlow(PnP(), NNField(), "a ball", cache=None, inversion_steps=8, **settings)
        shown.on_predict_batch_start(trainer, module, job, 0)
        shown.began = {}
        shown.update("invert", 1, 8)
        shown.update("invert", 2, 8)
    shown.update("recall", 1, 2)  # so half of the frames are inverted, and all edited
    shown.update("invert", 3, 4)
    lines = [line for line in capsys.readouterr().err.splitlines() if "each" in line]
    assert lines == [
        "invert: 2/8, 10.0 s each, 0:01:00 left, about 0:04:00 with the edit",  # 3 × 1.5 × 4 / 8
        "invert: 2/8, 10.0 s each, 0:01:00 left, about 0:03:00 with the edit",
        "invert: 3/4, 15.0 s each, 0:00:15 left, about 0:03:15 with the edit",
    ]


@pytest.mark.parametrize(
    ("each", "left", "words"),
    [
        (0.0, 3, ""),
        (0.25, 8, "4.0 a second, 0:00:02 left"),
        (90.0, 100, "90.0 s each, 2:30:00 left"),
    ],
)
def test_a_pace_is_a_rate_and_the_time_left(each: float, left: int, words: str) -> None:
    assert pace(each, left) == words


def test_in_a_slurm_job_a_terminal_is_none(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    # Lightning would look for the rest of SLURM
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False,
        plugins=[LightningEnvironment()],
    )  # fmt: skip
    module = module_of()
    StageProgress().on_predict_start(trainer, module)
    module.progress("edit", 2, 2)
    assert capsys.readouterr().err == "edit: 2/2\n"


def test_on_a_terminal_bars_tell_stage_step_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    ours, theirs = pty.openpty()
    parts: list[bytes] = []

    def read() -> None:
        with suppress(OSError):  # how a terminal ends
            while part := os.read(ours, 1 << 16):
                parts.append(part)

    reader = Thread(target=read)
    reader.start()
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    module = module_of()
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        shown = StageProgress()
        shown.on_predict_start(trainer, module)
        for stage in ("invert", "edit"):
            for step in range(1, 4):
                module.progress(stage, step, 4 if stage == "edit" else 3)
        shown.on_predict_end(trainer, module)
    reader.join()
    os.close(ours)
    drawn = b"".join(parts).decode()
    last = drawn[drawn.rindex("invert") :]
    assert "3/3" in last
    assert "edit" in last
    assert "3/4" in last
    assert "left" in last


def test_many_clips_are_counted_and_their_time_left_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter(range(0, 10_000, 60))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(now)))
    shown = StageProgress(interval=0.0)
    shown.begin("walk", 1, 30)
    shown.update("edit", 2, 2)
    shown.durations.append(100.0)
    shown.begin("jump", 3, 30, at_once=2)
    shown.update("edit", 1, 2)  # the time of the clip before does not count
    assert capsys.readouterr().err.splitlines() == [
        "clip 1/30, walk",
        "edit: 2/2",
        "clip 3/30, jump, 50.0 s each, 0:23:20 left",
        "edit: 1/2",
    ]


def test_on_a_terminal_each_clip_has_its_own_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = StageProgress()
    shown.bars = progress.Progress()
    for number, name in enumerate(("walk", "jump"), start=1):
        shown.begin(name, number, 2)
        shown.update("edit", number, 3)
    tasks = {task.description: (task.completed, task.total) for task in shown.bars.tasks}
    assert tasks == {"clips": (1, 2), "edit": (2, 3)}
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    shown.on_predict_end(trainer, module_of())
    assert [task.completed for task in shown.bars.tasks if task.description == "clips"] == [2]


def test_only_the_first_rank_speaks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "is_global_zero", False)
    module = module_of()
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    StageProgress().on_predict_start(trainer, module)
    module.progress("edit", 2, 2)
    assert capsys.readouterr().err == ""
