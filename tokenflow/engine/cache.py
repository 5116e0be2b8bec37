"""What is worth keeping between runs, in a folder: whole and checked, or not there."""

from __future__ import annotations

import os
import re
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tokenflow import digests
from tokenflow.errors import InputError
from tokenflow.video import atomic

FOLDER = "~/.cache/tokenflow"
CHECKSUM = "sha256"
STALE = 3600.0  # seconds after which a temporary file is no writer's any more
# whatever else lies in the folder is not the cache's
OWN = re.compile(r"(\.?)([0-9a-f]{2})[0-9a-f]*(\.\w+)?\.safetensors")


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


class Cache:
    """Tensors by key. Those not used for longest go first where the limit is exceeded.

    Several processes may use one folder: a file is written beside its name and renamed, and one
    that is damaged or gone counts as not there.

    Args:
        folder: Made when something is first kept.
        gigabytes: The limit, 10⁹ bytes each; `prune` holds to it.
    """

    def __init__(self, folder: str | Path, gigabytes: float = 20.0) -> None:
        if not gigabytes > 0:
            raise InputError(f"a cache's limit must be more than 0 gigabytes, got {gigabytes}")
        self.folder, self.limit = Path(folder).expanduser(), int(gigabytes * 1e9)
        self.full = False

    def require_writable(self) -> None:
        """Raises `InputError` where nothing could be kept."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise InputError(
                f"the cache folder {self.folder} cannot be written ({error}); choose another "
                f"--model.cache, or null for none"
            ) from error

    def path(self, key: str) -> Path:
        """Where a key's tensors are, or would be."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def load(self, key: str) -> dict[str, Tensor] | None:
        """A key's tensors, in host memory; None where there are none, or damaged ones."""
        path = self.path(key)
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if about.get(CHECKSUM) == digests.of_tensors(tensors):
                with suppress(OSError):  # it may be another user's
                    os.utime(path)
                return tensors
        except OSError:  # not there, or not to be read now: no reason to remove it
            return None
        except SafetensorError:
            pass
        warnings.warn(f"{path} is damaged; what it held is computed anew", stacklevel=2)
        self.remove(key)
        return None

    def save(self, key: str, tensors: Mapping[str, Tensor], kind: str, clip: str) -> None:
        """Keeps tensors; where the disk refuses, a warning says so and the run goes on."""
        own = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
        about = {CHECKSUM: digests.of_tensors(own), "kind": kind, "clip": clip}
        try:
            with atomic(self.path(key)) as temporary:
                save_file(own, temporary, about)
        except (OSError, SafetensorError) as error:
            told, self.full = self.full, True
            if not told:
                warnings.warn(
                    f"nothing can be kept in {self.folder} ({error}): the run goes on, but if it "
                    f"is interrupted it begins anew; free some space, or choose another "
                    f"--model.cache",
                    stacklevel=2,
                )

    def remove(self, key: str) -> None:
        """Forgets a key, if the disk lets it."""
        with suppress(OSError):
            self.path(key).unlink()

    def entries(self) -> list[Entry]:
        """All that is kept, longest unused first; what cannot be read is of kind "damaged"."""
        found = []
        for file in self.files():
            about: dict[str, str] = {}
            try:
                with safe_open(file.path, framework="pt") as content:
                    about = content.metadata() or {}
            except FileNotFoundError:  # another process has removed it
                continue
            except (OSError, SafetensorError):
                pass
            kind, clip = about.get("kind", "damaged"), about.get("clip", "")
            found.append(Entry(file.path, file.size, file.used, kind, clip))
        return found

    def files(self, left: bool = False) -> list[File]:
        """The files of all entries, longest unused first, or those `left` by writers; unopened."""
        found = []
        with suppress(OSError):  # folders, as files, may go while they are looked through
            for path in self.folder.glob("??/*.safetensors"):
                own = OWN.fullmatch(path.name)
                if own and own[2] == path.parent.name and bool(own[1]) is left:
                    with suppress(OSError):
                        state = path.stat()
                        found.append(File(path, state.st_size, state.st_mtime))
        return sorted(found, key=lambda file: file.used)

    def prune(self, limit: int | None = None) -> list[File]:
        """Removes what is longest unused until the rest has at most `limit` bytes, and returns it.

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
