"""Files that are either whole or not there."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from uuid import uuid4


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `path`, and rename it to `path` when the block ends well.

    The temporary name has the same suffix, so that writers which go by it work. The folder is
    made if needed. If the block raises, the temporary file is removed and `path` is as before.

    >>> with atomic("run/config.yaml") as temporary:
    ...     temporary.write_text("seed: 1")
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{uuid4().hex[:8]}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def require_room(folder: Path, size: int = 0) -> None:
    """Raise `OSError` unless so many bytes can be written in a folder, which is not made."""
    nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    with TemporaryFile(dir=nearest) as probe:
        probe.write(bytes(size))


def remove_leftovers(path: Path) -> None:
    """Remove what killed processes left of writing `path`; no process may be writing it now."""
    for left in path.parent.glob(f".{path.stem}.{'[0-9a-f]' * 8}{path.suffix}"):
        left.unlink(missing_ok=True)
