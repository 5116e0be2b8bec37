"""What is kept is whole and checked, or not there; the longest unused goes first."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tokenflow.engine import cache as cache_module
from tokenflow.engine.cache import Cache
from tokenflow.errors import InputError

TENSORS = {"latents": torch.arange(12.0).reshape(3, 4), "done": torch.tensor(7)}


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def keep(cache: Cache, key: str, used: float) -> None:
    cache.save(key, TENSORS, "inversion", key)
    os.utime(cache.path(key), (used, used))


def test_what_is_kept_comes_back(cache: Cache) -> None:
    assert cache.load("ab12") is None
    cache.save(
        "ab12", {**TENSORS, "strided": torch.arange(6.0).reshape(2, 3).T}, "sampling", "ball"
    )
    found = cache.load("ab12")
    assert found is not None
    assert torch.equal(found["latents"], TENSORS["latents"])
    assert int(found["done"]) == 7
    assert torch.equal(found["strided"], torch.tensor([[0.0, 3], [1, 4], [2, 5]]))
    [entry] = cache.entries()
    assert (entry.kind, entry.clip, entry.path) == ("sampling", "ball", cache.path("ab12"))
    cache.remove("ab12")
    assert cache.load("ab12") is None
    cache.remove("ab12")  # no error


@pytest.mark.parametrize("damage", ["a flipped bit", "cut", "empty", "text"])
def test_a_damaged_entry_is_noticed_and_removed(cache: Cache, damage: str) -> None:
    cache.save("ab12", TENSORS, "inversion", "ball")
    path = cache.path("ab12")
    whole = path.read_bytes()
    flipped = whole[:-1] + bytes([whole[-1] ^ 1])
    path.write_bytes({"cut": whole[:-4], "empty": b"", "text": b"?" * 99}.get(damage, flipped))
    with pytest.warns(UserWarning, match="is damaged; what it held is computed anew"):
        assert cache.load("ab12") is None
    assert not path.exists()


def test_the_longest_unused_goes_first(cache: Cache) -> None:
    for number, key in enumerate(["aa", "bb", "cc"]):
        keep(cache, key, 1000.0 + number)
    size = cache.entries()[0].size
    assert cache.load("aa") is not None  # and so it was used just now
    assert [file.path for file in cache.prune(2 * size)] == [cache.path("bb")]
    assert [entry.clip for entry in cache.entries()] == ["cc", "aa"]
    assert cache.prune() == []
    assert len(cache.prune(0)) == 2


def test_pruning_takes_what_killed_processes_left(cache: Cache) -> None:
    keep(cache, "aa", 1000.0)
    old, new = (cache.path("aa").with_name(f".aa.{n}.safetensors") for n in ("old", "new"))
    for path in (old, new):
        path.touch()
    os.utime(old, (1000.0, 1000.0))
    cache.prune()
    assert not old.exists()
    assert new.exists()  # its writer may be at it
    assert [entry.clip for entry in cache.entries()] == ["aa"]


def test_pruning_leaves_what_is_not_the_caches(cache: Cache) -> None:
    """A configuration may name any folder as the cache."""
    others = [cache.folder / "v1" / "model.safetensors", cache.folder / "ab" / "cd.safetensors"]
    for path in others:
        path.parent.mkdir(parents=True)
        path.touch()
    assert cache.prune(0) == cache.entries() == []
    assert all(path.exists() for path in others)


def test_pruning_opens_nothing(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(cache, "aa", 1000.0)
    monkeypatch.setattr("tokenflow.engine.cache.safe_open", None)
    assert len(cache.prune(0)) == 1


def test_pruning_beside_other_processes(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which one takes files away after they were seen, and one owns a file."""
    for number, key in enumerate(["aa", "bb", "cc"]):
        keep(cache, key, 1000.0 + number)
    writing = cache.path("cc").with_name(".cc.new.safetensors")
    writing.touch()
    stat, unlink = Path.stat, Path.unlink

    def vanished(path: Path, **options: Any) -> os.stat_result:
        if path in (writing, cache.path("aa")):
            unlink(path)
        return stat(path, **options)

    def refused(path: Path, missing_ok: bool = False) -> None:
        if path == cache.path("bb"):
            raise PermissionError(path)
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "stat", vanished)
    monkeypatch.setattr(Path, "unlink", refused)
    assert [file.path for file in cache.prune(0)] == [cache.path("cc")]
    monkeypatch.setattr(Path, "glob", lambda *_: (_ for _ in ()).throw(FileNotFoundError))
    assert cache.prune(0) == []


def test_what_cannot_be_read_now_is_left_alone(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError("Permission denied")

    cache.save("ab12", {"x": torch.ones(3)}, "inversion", "walk")
    with monkeypatch.context() as patched:
        patched.setattr(cache_module.os, "utime", refused)  # another user's
        assert cache.load("ab12") is not None
        patched.setattr(cache_module, "safe_open", refused)
        assert cache.load("ab12") is None
        patched.setattr(Path, "unlink", refused)
        cache.remove("ab12")
    assert cache.load("ab12") is not None


def test_a_folder_that_vanishes_is_made_again(cache: Cache) -> None:
    cache.save("aa", TENSORS, "inversion", "ball")
    for entry in cache.entries():
        entry.path.unlink()
    for folder in (cache.folder / "aa", cache.folder):
        folder.rmdir()
    assert cache.load("aa") is None
    assert cache.entries() == cache.prune() == []
    cache.save("aa", TENSORS, "inversion", "ball")
    assert cache.load("aa") is not None


FULL = """
import resource, warnings, torch
from tokenflow.engine.cache import Cache
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
warnings.simplefilter("error")
cache = Cache({folder!r})
for _ in range(2):
    try:
        cache.save("aa", dict(x=torch.zeros(1000)), "inversion", "ball")
    except UserWarning as warning:
        print(warning)
print(cache.load("aa"), list(cache.folder.glob("*/*")))
"""


def test_a_full_disk_is_told_once_and_leaves_nothing(tmp_path: Path) -> None:
    folder = str(tmp_path / "cache")
    done = subprocess.run(
        [sys.executable, "-c", FULL.format(folder=folder)],
        capture_output=True,
        text=True,
        check=True,
    )
    told, rest = done.stdout.splitlines()
    assert told.startswith(f"nothing can be kept in {folder} (")
    assert told.endswith("free some space, or choose another --model.cache")
    assert rest == "None []"


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan")])
def test_a_limit_of_nothing(tmp_path: Path, limit: float) -> None:
    with pytest.raises(InputError, match="more than 0 gigabytes"):
        Cache(tmp_path, limit)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot be written .*; choose another --model\.cache"):
        Cache(tmp_path / "file").require_writable()
    Cache(tmp_path / "new").require_writable()
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "probe").write_text("mine")
    Cache(tmp_path).require_writable()
    assert (tmp_path / "probe").read_text() == "mine"
