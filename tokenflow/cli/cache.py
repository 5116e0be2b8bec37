"""`tokenflow cache`: what is kept between runs, and making it less."""

from __future__ import annotations

import time
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from jsonargparse import auto_cli

from tokenflow.errors import InputError
from tokenflow.storage.cache_folder import CacheFolder, Entry, File
from tokenflow.storage.paths import FOLDER
from tokenflow.text import printable

HEADER = ("clip", "what", "files", "GB", "used, days ago")


def show(folder: Path = Path(FOLDER)) -> None:
    """Lists the entries of each clip, least recently used first.

    Args:
        folder: The cache, --model.cache of tokenflow predict.
    """
    cache = opened(folder)
    entries = cache.entries()
    print(table(entries))
    print(f"{printable(cache.folder)}: {gigabytes(entries):.3f} GB")


def prune(leave: float, folder: Path = Path(FOLDER)) -> None:
    """LRU eviction, until at most so much is left.

    Args:
        leave: Gigabytes that may stay, 10⁹ bytes each; 0 removes everything.
        folder: The cache, --model.cache of tokenflow predict.
    """
    if not leave >= 0:
        raise InputError(f"expected to leave 0 gigabytes or more, got {leave}")
    cache = opened(folder)
    gone = cache.prune(leave * 1e9)
    print(f"{printable(cache.folder)}: {len(gone)} files removed, {gigabytes(gone):.3f} GB")


def opened(folder: Path) -> CacheFolder:
    """The cache in a folder that is there.

    Raises:
        InputError: It is not.
    """
    cache = CacheFolder(folder)
    if not cache.folder.is_dir():
        raise InputError(f"there is no cache in {cache.folder}; name another --folder")
    return cache


def table(entries: Iterable[Entry]) -> str:
    """A line for each clip and kind."""

    def what(entry: Entry) -> tuple[str, str]:
        return printable(entry.clip), printable(entry.kind)

    rows = []
    for (clip, kind), those in groupby(sorted(entries, key=what), key=what):
        some = list(those)
        used = max(entry.used for entry in some)
        days = f"{(time.time() - used) / 86400:.1f}"
        rows.append(
            (
                used,
                (clip, kind, str(len(some)), f"{gigabytes(some):.3f}", days),
            )
        )
    lines = [HEADER, *(line for _, line in sorted(rows))]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def gigabytes(files: Iterable[File]) -> float:
    """Their size together."""
    return sum(file.size for file in files) / 1e9


def run(words: list[str]) -> None:
    """Runs the words after `tokenflow cache`.

    Raises:
        InputError: They cannot be carried out.
    """
    pruned = words[:1] == ["prune"]
    name, command = ("cache prune", prune) if pruned else ("cache", show)
    auto_cli(command, args=words[pruned:], prog=f"tokenflow {name}", as_positional=False)
