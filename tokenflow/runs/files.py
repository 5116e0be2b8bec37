"""A run's folder: whether it holds a finished run, and who may write to it now."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import mkdtemp

from filelock import FileLock, Timeout

from tokenflow.errors import InputError
from tokenflow.storage.atomic import remove_leftovers

EDITED, COMPARE, SHEET = "edited.mp4", "compare.mp4", "contact_sheet.png"
REPORT = "report.html"
RECORD = "run.yaml"
FAILED = "failed.yaml"
METRICS = "metrics.json"
FEATURES = "features.json"
MASK = "mask.mp4"
"""The automatic mask of a local edit."""
FILES = (EDITED, COMPARE, SHEET, MASK, METRICS, FEATURES, REPORT, RECORD)
NEEDED = (EDITED, COMPARE, SHEET, RECORD)
LOCK = ".lock"
UNFINISHED = ".unfinished-"
"""How the folder in a run's own begins where its files lie until all are there."""


def finished(folder: Path) -> bool:
    """Whether a run is whole: its last file is there, and no later run of it has failed."""
    return (folder / RECORD).exists() and not (folder / FAILED).exists()


def require_free(folder: Path) -> None:
    """Raises `IsADirectoryError` where a folder has the name of one of a run's files."""
    for path in (folder / name for name in (*FILES, FAILED)):
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder, expected none of this name")


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Gives a place for a run's files, which take those of the run before when the block ends well.

    If it raises, or the process is killed in it, the folder holds what it held. Who is killed at
    its end, while files take others' places, leaves no `RECORD`: no finished run.

    Raises:
        IsADirectoryError: A folder has the name of one of the files.
        FileNotFoundError: The block has left none of a file that every run has.
    """
    folder.mkdir(parents=True, exist_ok=True)
    place = Path(mkdtemp(prefix=UNFINISHED, dir=folder))
    try:
        yield place
        for name in NEEDED:
            (place / name).stat()  # what others have removed makes no finished run
        require_free(folder)
        (folder / RECORD).unlink(missing_ok=True)  # the run before is whole no more
        for name in FILES:
            if (place / name).exists():
                os.replace(place / name, folder / name)
            else:
                (folder / name).unlink(missing_ok=True)
        (folder / FAILED).unlink(missing_ok=True)
    finally:
        shutil.rmtree(place, ignore_errors=True)


class FolderLock:
    """One run's right to write to a folder; it ends with the process, however that ends."""

    def __init__(self, folder: Path) -> None:
        self.made = [place for place in (folder, *folder.parents) if not place.exists()]
        self.folder = folder
        self.lock = FileLock(folder / LOCK, timeout=0)

    def taken(self) -> bool:
        """Takes the right, unless another process has it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self.lock.acquire()
        except Timeout:
            return False
        except OSError as error:  # of a network's file system
            raise InputError(
                f"{self.folder} cannot be locked ({error}), and another run might write to it; "
                f"choose an --output.folder on a file system with locks"
            ) from error
        for place in self.folder.glob(f"{UNFINISHED}*"):
            shutil.rmtree(place, ignore_errors=True)
        for name in (*FILES, FAILED):
            remove_leftovers(self.folder / name)
        return True

    def release(self) -> None:
        """Gives it back, with the folders that were made for it if they are empty."""
        if not self.lock.is_locked:
            return
        (self.folder / LOCK).unlink(missing_ok=True)  # first: later it may be another run's
        self.lock.release()
        for place in self.made:
            with suppress(OSError):
                place.rmdir()
