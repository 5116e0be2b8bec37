"""Paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path


def local(path: str | Path) -> Path:
    """The path, with `~` as the user's home: no shell has seen what a YAML file holds.

    Unlike `Path.expanduser`, it leaves the home of a user that is not known as it is written.
    """
    return Path(os.path.expanduser(path))
