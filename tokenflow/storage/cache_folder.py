"""What lies in the cache's folder: which files, how old, and which go first. Needs no torch."""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from tokenflow.errors import InputError
from tokenflow.storage.paths import local
from tokenflow.text import printable

STALE = 3600.0  # seconds after which a temporary file is no writer's any more
# whatever else lies in the folder is not the cache's
PART = re.compile(r"[0-9a-f]{2}")
OWN = re.compile(r"([0-9a-f]{64})\.safetensors")
LEFT = re.compile(r"\.([0-9a-f]{64})\.[0-9a-f]{8}\.safetensors")  # as `atomic` names them


@dataclass(frozen=True)
class File:
    """One file of the cache: its bytes, and when it was used last."""

    path: Path
    size: int
    used: float


@dataclass(frozen=True)
class Entry(File):
    """One that was looked into: of which kind and clip it is."""

    kind: str
    clip: str


class CacheFolder:
    """The files of a cache, least recently used first.

    Args:
        folder: It need not be there.
        gigabytes: The limit, 10⁹ bytes each; `prune` holds to it. Infinity is none.

    Raises:
        InputError: The folder's name is none, or the limit no number above 0.
    """

    def __init__(self, folder: str | Path, gigabytes: float = 20.0) -> None:
        if not gigabytes > 0:
            raise InputError(f"a cache's limit must be more than 0 gigabytes, got {gigabytes}")
        self.folder, self.limit = folder_of(folder), gigabytes * 1e9

    def entries(self) -> list[Entry]:
        """All entries, least recently used first; an unreadable one is of kind "damaged"."""
        found = []
        for file in self.files():
            about: dict[str, str] = {}
            try:
                with safe_open(file.path, framework="np") as content:
                    about = content.metadata() or {}
            except FileNotFoundError:  # another process has removed it
                continue
            except (OSError, SafetensorError):
                pass
            kind, clip = about.get("kind", "damaged"), about.get("clip", "")
            found.append(Entry(file.path, file.size, file.used, kind, clip))
        return found

    def files(self, left: bool = False) -> list[File]:
        """The entries' files, least recently used first, or those `left` by writers; unopened."""
        found, form = [], LEFT if left else OWN
        for part in listed(self.folder):
            # what a link leads to is another's
            if not PART.fullmatch(part.name) or not part.is_dir(follow_symlinks=False):
                continue
            for file in listed(part.path):
                own = form.fullmatch(file.name)
                if own and own[1].startswith(part.name):
                    with suppress(OSError):  # files may go while they are looked through
                        state = file.stat(follow_symlinks=False)
                        if stat.S_ISREG(state.st_mode):
                            found.append(File(Path(file.path), state.st_size, state.st_mtime))
        return sorted(found, key=lambda file: file.used)

    def prune(self, limit: int | float | None = None) -> list[File]:
        """LRU eviction until at most `limit` bytes are left; returns the removed files.

        So do temporary files that a killed process left more than an hour ago. What cannot be
        removed stays.
        """
        for file in self.files(left=True):
            if time.time() - file.used > STALE:
                with suppress(OSError):
                    file.path.unlink()
        files, gone = self.files(), []
        size, most = sum(file.size for file in files), self.limit if limit is None else limit
        for file in files:
            if size <= most:
                break
            with suppress(OSError):
                file.path.unlink(missing_ok=True)
                size -= file.size
                gone.append(file)
        return gone


def folder_of(path: str | Path) -> Path:
    """A folder as the user has named it, with `~` as the home.

    Raises:
        InputError: It cannot be the name of a folder.
    """
    try:
        folder = local(path)
        if b"\0" in os.fsencode(folder):
            raise ValueError("it holds a NUL")
    except ValueError as error:  # lone surrogates, too
        raise InputError(
            f"the cache folder {printable(path)} is no path ({error}); choose another "
            f"--model.cache, or null for none"
        ) from error
    return folder


def listed(folder: str | Path) -> Iterator[os.DirEntry[str]]:
    """What is in a folder, as far as it can be read: it may go meanwhile."""
    with suppress(OSError), os.scandir(folder) as entries:
        yield from entries
