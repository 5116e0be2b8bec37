"""Who may write to a run's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tokenflow.engine.folder import FolderLock


def test_one_run_at_a_time_and_nothing_stays(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "clip"
    first, second = FolderLock(folder), FolderLock(folder)
    assert first.taken()
    assert not second.taken()
    first.release()
    assert second.taken()
    second.release()
    first.release()  # no error
    assert not list(tmp_path.glob("runs/clip/*"))


def test_a_lock_that_is_taken_at_once_again_keeps_others_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = (FolderLock(tmp_path) for _ in range(3))
    assert first.taken()
    release = first.lock.release

    def released(**options: Any) -> None:
        release(**options)
        assert second.taken()

    monkeypatch.setattr(first.lock, "release", released)
    first.release()
    assert not third.taken()
    second.release()
    assert not list(tmp_path.iterdir())
