"""What is worth keeping between runs, in a folder: whole and checked, or not there."""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tokenflow.errors import InputError
from tokenflow.storage import digests
from tokenflow.storage.atomic import atomic
from tokenflow.storage.cache_folder import CacheFolder
from tokenflow.text import printable

CHECKSUM, KEY = "sha256", "key"


class Cache(CacheFolder):
    """Tensors by key, a digest of `storage.digests`. Those not used for longest go first where
    the limit is exceeded.

    Several processes may use one folder: a file is written beside its name and renamed, and one
    that is damaged or gone counts as not there.

    Args:
        folder: Made when something is first kept.
        gigabytes: The limit, 10⁹ bytes each; `prune` holds to it. Infinity is none.

    Raises:
        InputError: The folder's name is none, or the limit no number above 0.
    """

    def __init__(self, folder: str | Path, gigabytes: float = 20.0) -> None:
        super().__init__(folder, gigabytes)
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

    def load(
        self, key: str, fits: Callable[[Mapping[str, Tensor]], bool] = lambda tensors: True
    ) -> dict[str, Tensor] | None:
        """A key's tensors, in host memory; None where there are none, or others.

        What is damaged, was kept under another key, or does not fit, is removed.
        """
        path = self.path(key)
        try:
            if not stat.S_ISREG(path.lstat().st_mode):  # opening a FIFO would wait for its writer
                return None
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            whole = about.get(KEY) == key and fits(tensors)
            if whole and about.get(CHECKSUM) == digests.of_tensors(tensors):
                with suppress(OSError):  # it may be another user's
                    os.utime(path)
                return tensors
        except OSError:  # not there, or not to be read now: no reason to remove it
            return None
        except SafetensorError:
            pass
        warnings.warn(
            f"{printable(path)} is damaged or holds something else; what it should hold is "
            f"computed anew",
            stacklevel=2,
        )
        self.remove(key)
        return None

    def save(self, key: str, tensors: Mapping[str, Tensor], kind: str, clip: str) -> None:
        """Writes tensors; a disk error is a warning, and the run continues."""
        own = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
        about = {CHECKSUM: digests.of_tensors(own), KEY: key, "kind": kind, "clip": printable(clip)}
        try:
            with atomic(self.path(key)) as temporary:
                # save_file's own file would be for its owner's eyes only, whatever the umask
                temporary.write_bytes(save(own, about))
        except (OSError, SafetensorError) as error:
            warned, self.full = self.full, True
            if not warned:
                warnings.warn(
                    f"the cache {printable(self.folder)} cannot be written ({printable(error)}): "
                    f"the run continues, but cannot be resumed; free some space, or "
                    f"choose another --model.cache",
                    stacklevel=2,
                )

    def remove(self, key: str) -> None:
        """Forgets a key, if the disk lets it."""
        with suppress(OSError):
            self.path(key).unlink()
