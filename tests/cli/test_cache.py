"""`tokenflow cache`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tokenflow.cli.main import main
from tokenflow.storage.cache import Cache


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With two frames of one clip, and one of another that was used before; 4 MB each."""
    cache = Cache(tmp_path / "cache")
    for key, clip, used in (("aa", "walk", 2000), ("bb", "walk", 3000), ("cc", "jump", 1000)):
        key = key.ljust(64, "0")
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
    assert [entry.path.stem[:2] for entry in Cache(folder).entries()] == ["bb"]
    main(["cache", "prune", f"--folder={folder}", "--leave=0"])
    assert Cache(folder).entries() == []


def test_all_may_stay(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["cache", "prune", f"--folder={folder}", "--leave=.inf"])
    assert "0 files removed" in capsys.readouterr().out


def test_names_are_escaped(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where another program has written them."""
    path = Cache(folder).path("dd".ljust(64, "0"))
    path.parent.mkdir()
    save_file({"x": torch.ones(1)}, path, {"clip": "a\x1b[2J\nb", "kind": "\x07"})
    main(["cache", f"--folder={folder}"])
    out = capsys.readouterr().out
    assert r"a\x1b[2J\nb  \x07" in out
    assert not {"\x1b", "\x07"} & set(out)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--folder=/nowhere"], "there is no cache in /nowhere; name another --folder"),
        (["--folder=a\0b"], r"the cache folder a\x00b is no path"),
        (["prune", "--leave=.nan"], "expected to leave 0 gigabytes or more, got nan"),
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
