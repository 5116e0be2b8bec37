"""What is kept is whole and checked, or not there; the longest unused goes first."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tokenflow.errors import InputError
from tokenflow.storage import cache as cache_module
from tokenflow.storage.cache import Cache
from tokenflow.text import printable

AA, BB, CC, KEY = (start.ljust(64, "0") for start in ("aa", "bb", "cc", "ab12"))
TENSORS = {"latents": torch.arange(12.0).reshape(3, 4), "done": torch.tensor(7)}


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def keep(cache: Cache, key: str, used: float) -> None:
    cache.save(key, TENSORS, "inversion", key)
    os.utime(cache.path(key), (used, used))


def test_what_is_kept_comes_back(cache: Cache) -> None:
    assert cache.load(KEY) is None
    cache.save(KEY, {**TENSORS, "strided": torch.arange(6.0).reshape(2, 3).T}, "sampling", "ball")
    found = cache.load(KEY)
    assert found is not None
    assert torch.equal(found["latents"], TENSORS["latents"])
    assert int(found["done"]) == 7
    assert torch.equal(found["strided"], torch.tensor([[0.0, 3], [1, 4], [2, 5]]))
    [entry] = cache.entries()
    assert (entry.kind, entry.clip, entry.path) == ("sampling", "ball", cache.path(KEY))
    cache.remove(KEY)
    assert cache.load(KEY) is None
    cache.remove(KEY)  # no error


@pytest.mark.parametrize("damage", ["a flipped bit", "cut", "empty", "text"])
def test_a_damaged_entry_is_noticed_and_removed(cache: Cache, damage: str) -> None:
    cache.save(KEY, TENSORS, "inversion", "ball")
    path = cache.path(KEY)
    whole = path.read_bytes()
    flipped = whole[:-1] + bytes([whole[-1] ^ 1])
    path.write_bytes({"cut": whole[:-4], "empty": b"", "text": b"?" * 99}.get(damage, flipped))
    with pytest.warns(UserWarning, match="is damaged or holds something else; what it"):
        assert cache.load(KEY) is None
    assert not path.exists()


def test_the_longest_unused_goes_first(cache: Cache) -> None:
    for number, key in enumerate([AA, BB, CC]):
        keep(cache, key, 1000.0 + number)
    size = cache.entries()[0].size
    assert cache.load(AA) is not None  # and so it was used just now
    assert [file.path for file in cache.prune(2 * size)] == [cache.path(BB)]
    assert [entry.clip for entry in cache.entries()] == [CC, AA]
    assert cache.prune() == []
    assert len(cache.prune(0)) == 2


def test_pruning_takes_what_killed_processes_left(cache: Cache) -> None:
    keep(cache, AA, 1000.0)
    old, new = (
        cache.path(AA).with_name(f".{AA}.{n}.safetensors") for n in ("01234567", "89abcdef")
    )
    for path in (old, new):
        path.touch()
    os.utime(old, (1000.0, 1000.0))
    cache.prune()
    assert not old.exists()
    assert new.exists()  # its writer may be at it
    assert [entry.clip for entry in cache.entries()] == [AA]


def test_pruning_leaves_what_is_not_the_caches(cache: Cache) -> None:
    """A configuration may name any folder as the cache."""
    others = [cache.folder / "v1" / "model.safetensors", cache.folder / "ab" / "cd.safetensors"]
    for path in others:
        path.parent.mkdir(parents=True)
        path.touch()
    assert cache.prune(0) == cache.entries() == []
    assert all(path.exists() for path in others)


def test_pruning_opens_nothing(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(cache, AA, 1000.0)
    monkeypatch.setattr("tokenflow.storage.cache_folder.safe_open", None)
    assert len(cache.prune(0)) == 1


def test_pruning_beside_other_processes(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which one takes a file away after it was seen, and one owns a file."""
    for number, key in enumerate([AA, BB, CC]):
        keep(cache, key, 1000.0 + number)
    unlink = Path.unlink

    def meanwhile(path: Path, missing_ok: bool = False) -> None:
        if path == cache.path(AA):
            unlink(path)
        if path == cache.path(BB):
            raise PermissionError(path)
        unlink(path, missing_ok)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", meanwhile)
        assert [file.path for file in cache.prune(0)] == [cache.path(AA), cache.path(CC)]
    shutil.rmtree(cache.folder)
    assert cache.prune(0) == []


@pytest.mark.parametrize(
    "name",
    [
        "ab/ab.safetensors",  # hexadecimal, but no digest
        f"ab/ab{'0' * 61}.safetensors",
        f"ab/ab{'0' * 62}.safetensors.bak",
        f"ab/AB{'0' * 62}.safetensors",
        f"ab/{AA}.safetensors",  # of another folder
        f"{KEY}.safetensors",
        f"ab/.{KEY}.mine.safetensors",
        f"ab/more/{KEY}.safetensors",
        f"abc/{KEY}.safetensors",
    ],
)
def test_files_of_another_form_are_not_the_caches(cache: Cache, name: str) -> None:
    path = cache.folder / name
    path.parent.mkdir(parents=True)
    path.write_bytes(b"a model")
    os.utime(path, (1000.0, 1000.0))
    assert cache.prune(0) == cache.entries() == []
    assert path.read_bytes() == b"a model"


def test_links_lead_out_of_the_cache(cache: Cache, tmp_path: Path) -> None:
    other = Cache(tmp_path / "other")
    for key in (AA, BB):
        keep(other, key, 1000.0)
    cache.folder.mkdir()
    (cache.folder / "aa").symlink_to(other.folder / "aa")
    (cache.folder / "bb").mkdir()
    cache.path(BB).symlink_to(other.path(BB))
    left = (other.folder / "aa").joinpath(f".{AA}.01234567.safetensors")
    left.touch()
    os.utime(left, (1000.0, 1000.0))
    assert cache.prune(0) == cache.entries() == []
    assert left.exists()
    assert len(other.entries()) == 2
    linked = tmp_path / "linked"  # the whole cache may lie elsewhere
    linked.symlink_to(other.folder)
    assert len(Cache(linked).prune(0)) == 2


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    here = os.open(path.parent, os.O_RDONLY)  # a socket's path may have few characters
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(f"/proc/self/fd/{here}/{path.name}")
    os.close(here)


@pytest.mark.parametrize("make", [make_fifo, make_socket, Path.mkdir])
def test_what_is_no_file_is_passed_over(cache: Cache, make: Callable[[Path], None]) -> None:
    path = cache.path(KEY)
    path.parent.mkdir(parents=True)
    make(path)
    assert cache.load(KEY) is None  # a FIFO that is opened waits for a writer
    assert cache.entries() == cache.files() == cache.prune(0) == []
    assert path.exists()


def test_an_entry_is_tied_to_its_key(cache: Cache) -> None:
    for key in (AA, BB):
        cache.save(key, {"x": torch.tensor([float(key == AA)])}, "inversion", "ball")
    shutil.copy(cache.path(AA), cache.path(BB))
    with pytest.warns(UserWarning, match="what it should hold is computed anew"):
        assert cache.load(BB) is None
    assert not cache.path(BB).exists()
    assert cache.load(AA) is not None


def test_what_does_not_fit_is_removed(cache: Cache) -> None:
    cache.save(AA, TENSORS, "inversion", "ball")
    assert cache.load(AA, lambda tensors: tensors.keys() == TENSORS.keys()) is not None
    with pytest.warns(UserWarning, match="holds something else"):
        assert cache.load(AA, lambda tensors: "noise" in tensors) is None
    assert not cache.path(AA).exists()


@pytest.mark.parametrize("mask", [0o002, 0o022, 0o077])
def test_who_may_read_follows_the_umask(cache: Cache, mask: int) -> None:
    before = os.umask(mask)
    try:
        cache.save(AA, TENSORS, "inversion", "ball")
    finally:
        os.umask(before)
    assert cache.path(AA).stat().st_mode & 0o777 == 0o666 & ~mask
    for folder in (cache.folder, cache.folder / "aa"):
        assert folder.stat().st_mode & 0o777 == 0o777 & ~mask


@pytest.mark.parametrize("name", [os.fsdecode(b"caf\xe9"), "\ud800", "a\x1b[2J\nb"])
def test_any_clip_is_kept_by_name(cache: Cache, name: str) -> None:
    cache.save(AA, TENSORS, "inversion", name)
    [entry] = cache.entries()
    assert entry.clip == printable(name)
    assert cache.load(AA) is not None


def test_what_cannot_be_read_now_is_left_alone(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError("Permission denied")

    cache.save(KEY, {"x": torch.ones(3)}, "inversion", "walk")
    with monkeypatch.context() as patched:
        patched.setattr(cache_module.os, "utime", refused)  # another user's
        assert cache.load(KEY) is not None
        patched.setattr(cache_module, "safe_open", refused)
        assert cache.load(KEY) is None
        patched.setattr(Path, "unlink", refused)
        cache.remove(KEY)
    assert cache.load(KEY) is not None


def test_a_folder_that_vanishes_is_made_again(cache: Cache) -> None:
    cache.save(AA, TENSORS, "inversion", "ball")
    for entry in cache.entries():
        entry.path.unlink()
    for folder in (cache.folder / "aa", cache.folder):
        folder.rmdir()
    assert cache.load(AA) is None
    assert cache.entries() == cache.prune() == []
    cache.save(AA, TENSORS, "inversion", "ball")
    assert cache.load(AA) is not None


FULL = """
import resource, warnings, torch
from tokenflow.storage.cache import Cache
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
warnings.simplefilter("error")
cache = Cache({folder!r})
for _ in range(2):
    try:
        cache.save("aa" * 32, dict(x=torch.zeros(1000)), "inversion", "ball")
    except UserWarning as warning:
        print(warning)
print(cache.load("aa" * 32), list(cache.folder.glob("*/*")))
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
    assert told.startswith(f"the cache {folder} cannot be written (")
    assert told.endswith("free some space, or choose another --model.cache")
    assert rest == "None []"


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan")])
def test_a_limit_of_nothing(tmp_path: Path, limit: float) -> None:
    with pytest.raises(InputError, match="more than 0 gigabytes"):
        Cache(tmp_path, limit)


def test_no_limit(cache: Cache) -> None:
    endless = Cache(cache.folder, float("inf"))
    keep(endless, AA, 1000.0)
    assert endless.prune() == []
    assert endless.load(AA) is not None


@pytest.mark.parametrize("name", ["a\0b", "\ud800"])
def test_a_folder_that_is_no_path(name: str) -> None:
    with pytest.raises(InputError, match=r"is no path .*; choose another --model\.cache"):
        Cache(name)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot be written .*; choose another --model\.cache"):
        Cache(tmp_path / "file").require_writable()
    Cache(tmp_path / "new").require_writable()
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "probe").write_text("mine")
    Cache(tmp_path).require_writable()
    assert (tmp_path / "probe").read_text() == "mine"
