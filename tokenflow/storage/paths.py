"""Paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path


def local(path: str | Path) -> Path:
    """The path, with `~` as the user's home: no shell has seen what a YAML file holds.

    Unlike `Path.expanduser`, it leaves the home of a user that is not known as it is written.
    """
    return Path(os.path.expanduser(path))


def default_cache() -> str:
    """The folder of the cache where no other is chosen, as the XDG specification has it.

    $XDG_CACHE_HOME/tokenflow, if that is an absolute path, else ~/.cache/tokenflow.
    """
    home = os.environ.get("XDG_CACHE_HOME", "")
    return os.path.join(home if os.path.isabs(home) else "~/.cache", "tokenflow")


FOLDER = default_cache()
