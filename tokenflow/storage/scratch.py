"""Room for what may be too big for memory: temporary files that have no name.

They go with the process, however it ends. Where they are is Python's choice: the environment
variable TMPDIR, if it is set.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from tempfile import TemporaryFile, gettempdir

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from tokenflow.errors import InputError

BUDGET = 1 << 30
"""Bytes of one thing (a clip's frames, its trajectory) that stay in memory: 1 GiB."""


@contextmanager
def disk() -> Iterator[None]:
    """A block that writes temporary files; raises `InputError` where the disk refuses."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"what is too big for memory cannot be kept in {gettempdir()} ({error}); free some "
            f"space there, or name another folder by the environment variable TMPDIR"
        ) from error


def empty_or_memmap(*shape: int, budget: int = BUDGET) -> Float32[Tensor, ...]:
    """An uninitialised tensor; beyond the budget in a file that is mapped into memory.

    The file's pages are in memory only as long as there is room for them.

    Raises:
        InputError: The disk refuses.
    """
    size = 4 * prod(shape)
    return torch.empty(shape) if size <= budget else mapped(size).view(torch.float32).view(shape)


def on_disk(tensor: Tensor) -> Tensor:
    """A copy in a file that is mapped into memory.

    Raises:
        InputError: The disk refuses.
    """
    if not tensor.numel():
        return tensor
    return mapped(tensor.nbytes).view(tensor.dtype).view(tensor.shape).copy_(tensor)


def mapped(size: int) -> Tensor:
    """So many bytes in a file that has no name."""
    with disk(), TemporaryFile() as file:
        os.posix_fallocate(file.fileno(), 0, size)  # else a full disk is a bus error, later
        return torch.from_numpy(np.memmap(file, np.uint8, "r+", shape=(size,)))
