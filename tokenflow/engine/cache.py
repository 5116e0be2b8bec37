"""What is worth keeping between runs, in a folder: whole and checked, or not there."""

from __future__ import annotations

import hashlib
import os
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tokenflow.errors import InputError
from tokenflow.video import atomic

FOLDER = "~/.cache/tokenflow"
CHECKSUM = "sha256"
STALE = 3600.0  # seconds after which a temporary file is no writer's any more


@dataclass(frozen=True)
class Entry:
    """One file of the cache: of which kind and clip, its bytes, when it was used last."""

    path: Path
    kind: str
    clip: str
    size: int
    used: float


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
            with atomic(self.folder / "probe") as probe:
                probe.touch()
            (self.folder / "probe").unlink(missing_ok=True)
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
            if about.get(CHECKSUM) == checksum(tensors):
                os.utime(path)
                return tensors
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError):
            pass
        warnings.warn(f"{path} is damaged; what it held is computed anew", stacklevel=2)
        self.remove(key)
        return None

    def save(self, key: str, tensors: Mapping[str, Tensor], kind: str, clip: str) -> None:
        """Keeps tensors; where the disk refuses, a warning says so and the run goes on."""
        own = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
        about = {CHECKSUM: checksum(own), "kind": kind, "clip": clip}
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
        """Forgets a key."""
        self.path(key).unlink(missing_ok=True)

    def entries(self) -> list[Entry]:
        """All that is kept, longest unused first; what cannot be read is of kind "damaged"."""
        found = []
        for path in self.folder.glob("??/*.safetensors"):
            if path.name.startswith("."):
                continue
            about: dict[str, str] = {}
            try:
                state = path.stat()
                with safe_open(path, framework="pt") as file:
                    about = file.metadata() or {}
            except FileNotFoundError:  # another process has removed it
                continue
            except (OSError, SafetensorError):
                pass
            kind, clip = about.get("kind", "damaged"), about.get("clip", "")
            found.append(Entry(path, kind, clip, state.st_size, state.st_mtime))
        return sorted(found, key=lambda entry: entry.used)

    def prune(self, limit: int | None = None) -> list[Entry]:
        """Removes what is longest unused until the rest has at most `limit` bytes, and returns it.

        So do temporary files that a killed process left more than an hour ago.
        """
        for left in self.folder.glob("??/.*.safetensors"):
            if time.time() - left.stat().st_mtime > STALE:
                left.unlink(missing_ok=True)
        entries, gone = self.entries(), []
        size, most = sum(entry.size for entry in entries), self.limit if limit is None else limit
        for entry in entries:
            if size <= most:
                break
            entry.path.unlink(missing_ok=True)
            size -= entry.size
            gone.append(entry)
        return gone


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, shapes, types and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
