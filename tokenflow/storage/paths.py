"""Paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path


def local(path: str | Path) -> Path:
    """The path, with `~` as the user's home: no shell has seen what a YAML file holds.

    Unlike `Path.expanduser`, it leaves a ~nobody as it is.
    """
    return Path(os.path.expanduser(path))
