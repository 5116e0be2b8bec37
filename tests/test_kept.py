"""`tokenflow cache`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tokenflow.cli import main
from tokenflow.engine.cache import Cache


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With two frames of one clip, and one of another that was used before; 4 MB each."""
    cache = Cache(tmp_path / "cache")
    for key, clip, used in (("aa", "walk", 2000), ("bb", "walk", 3000), ("cc", "jump", 1000)):
        cache.save(key, {"x": torch.zeros(1_000_000)}, "inversion", clip)
        os.utime(cache.path(key), (used, used))
    return cache.folder


def test_what_is_kept_is_listed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["cache", f"--folder={folder}"])
    header, *lines, last = capsys.readouterr().out.splitlines()
    assert header.split("  ")[0] == "clip"
    assert [line.split()[:4] for line in lines] == [
        ["jump", "inversion", "1", "0.004"],
        ["walk", "inversion", "2", "0.008"],
    ]
    assert last == f"{folder}: 0.012 GB"


def test_the_longest_unused_goes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["cache", "prune", f"--folder={folder}", "--leave=0.005"])
    assert "2 files removed" in capsys.readouterr().out
    assert [entry.path.stem for entry in Cache(folder).entries()] == ["bb"]
    main(["cache", "prune", f"--folder={folder}", "--leave=0"])
    assert Cache(folder).entries() == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--folder=/nowhere"], "there is no cache in /nowhere; name another --folder"),
        (["prune", "--leave=-1"], "expected to leave 0 gigabytes or more, got -1"),
        (["prune"], "leave"),
        (["purge"], "purge"),
    ],
)
def test_bad_words(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["cache", *words])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
