"""How far, how fast, and the ETA: in bars on a terminal, else in lines."""

from __future__ import annotations

import os
import pty
import sys
from contextlib import suppress
from itertools import count
from threading import Thread

import pytest

from tokenflow.engine.progress import Reporter


def reporter(interval: float = 0.0) -> Reporter:
    """One whose clock is asked every 5 seconds: twice in a step."""
    return Reporter(interval, count(0.0, 5.0).__next__)


def test_lines_are_printed_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    lines = reporter(interval=15.0)
    for step in range(1, 6):
        lines.step("edit", step, 5)
    assert capsys.readouterr().err.splitlines() == [
        "edit: 1/5",
        "edit: 3/5, 10.0 s each, ETA 0:00:20",
        "edit: 5/5, 10.0 s each, ETA 0:00:00",
    ]


def test_a_stage_that_is_resumed_has_its_own_pace(capsys: pytest.CaptureFixture[str]) -> None:
    lines = reporter()
    for step in (31, 32, 36):
        lines.step("edit", step, 50)
    assert capsys.readouterr().err.splitlines() == [
        "edit: 31/50",
        "edit: 32/50, 10.0 s each, ETA 0:03:00",
        "edit: 36/50, 4.0 s each, ETA 0:00:56",
    ]


def test_the_eta_may_include_what_follows(capsys: pytest.CaptureFixture[str]) -> None:
    lines = reporter()
    for step in (1, 2):
        lines.step("invert", step, 8, more=18.0)
    assert capsys.readouterr().err.splitlines() == [
        "invert: 1/8",
        "invert: 2/8, 10.0 s each, ETA 0:04:00 including the edit",
    ]


def test_items_are_counted_as_they_begin(capsys: pytest.CaptureFixture[str]) -> None:
    lines = reporter()
    for number, name in ((1, "walk"), (3, "jump\x1b[2J")):  # the second is another rank's
        lines.forget("clip")
        lines.item("clip", name, number, 30)
        lines.step("edit", 2, 2)
        lines.step("edit", 2, 2)
    assert capsys.readouterr().err.splitlines() == [
        "clip 1/30, walk",
        "edit: 2/2",
        "edit: 2/2",
        r"clip 3/30, jump\x1b[2J, 12.5 s each, ETA 0:05:50",
        "edit: 2/2",  # the pace of the clip before does not count
        "edit: 2/2",
    ]


def test_a_fast_pace_is_a_rate(capsys: pytest.CaptureFixture[str]) -> None:
    lines = Reporter(0.0, count(0.0, 0.125).__next__)
    lines.step("edit", 1, 10)
    lines.step("edit", 2, 10)
    assert capsys.readouterr().err.splitlines()[1] == "edit: 2/10, 4.0 a second, ETA 0:00:02"


def test_a_slurm_job_has_lines_on_a_terminal_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for job, printed in (("7", "edit: 2/2\n"), (None, "")):
        monkeypatch.delenv("SLURM_JOB_ID", raising=False)
        if job is not None:
            monkeypatch.setenv("SLURM_JOB_ID", job)
        Reporter().step("edit", 2, 2)
        assert capsys.readouterr().err == printed


def test_a_terminal_has_bars(monkeypatch: pytest.MonkeyPatch) -> None:
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
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        bars = reporter()
        with bars.bars:
            for number, name in enumerate(("walk", "jump[/x]"), start=1):
                bars.forget("clip")
                bars.item("clip", name, number, 2)
                bars.step("edit", 1, 4)
                bars.step("edit", 3, 4)
            bars.complete("clip")
    reader.join()
    os.close(ours)
    drawn = b"".join(parts).decode()
    last = drawn[drawn.rindex("clip jump[/x]") :]
    assert last.index("2/2") < last.index("edit") < last.index("3/4") < last.index("ETA 0:00:0")
    assert "clip 1/2" not in drawn  # as lines have it
