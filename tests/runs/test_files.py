"""Who may write to a run's folder."""

from __future__ import annotations

from errno import ENOLCK
from os import strerror
from pathlib import Path
from typing import Any

import pytest

from tokenflow.errors import InputError
from tokenflow.runs.files import NEEDED, FolderLock, staged


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


def test_without_its_files_no_run_is_finished(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("of the run before")
    with pytest.raises(FileNotFoundError, match=r"edited\.mp4"), staged(tmp_path) as place:
        (place / "run.yaml").write_text("of this one, whose videos others have removed")
    assert (tmp_path / "run.yaml").read_text() == "of the run before"


def test_a_folder_in_the_way_leaves_the_run_before_whole(tmp_path: Path) -> None:
    (tmp_path / "compare.mp4").mkdir()
    for name in ("edited.mp4", "run.yaml"):
        (tmp_path / name).write_text("of the run before")
    whole = staged(tmp_path)
    place = whole.__enter__()
    for name in NEEDED:
        (place / name).write_text("of this one")
    with pytest.raises(IsADirectoryError, match=r"compare\.mp4 is a folder"):
        whole.__exit__(None, None, None)
    for name in ("edited.mp4", "run.yaml"):
        assert (tmp_path / name).read_text() == "of the run before"


def test_a_file_system_without_locks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def acquire() -> None:
        raise OSError(ENOLCK, strerror(ENOLCK))

    lock = FolderLock(tmp_path)
    monkeypatch.setattr(lock.lock, "acquire", acquire)
    with pytest.raises(InputError, match=r"No locks available.*choose an --output.folder"):
        lock.taken()


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
