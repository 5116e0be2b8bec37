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
BLOCK = 1 << 26
"""Bytes of a file that several small things share."""
ALIGNED = 8
"""What their places in it are multiples of."""


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


class Spill:
    """Keeps tensors in memory, and beyond a budget in files that are mapped into memory.

    Args:
        budget: Bytes that stay in memory.
    """

    def __init__(self, budget: int = BUDGET) -> None:
        self.budget, self.size = budget, 0
        self.block, self.used = torch.empty(0, dtype=torch.uint8), 0

    def keep(self, tensor: Tensor) -> Tensor:
        """The tensor, or its copy in a file; many share a file.

        Raises:
            InputError: The disk refuses.
        """
        size = tensor.nbytes
        if not size or self.size + size <= self.budget:
            self.size += size
            return tensor
        if self.used + size > len(self.block):
            self.block, self.used = mapped(max(BLOCK, size)), 0
        place = self.block[self.used : self.used + size]
        self.used += -(-size // ALIGNED) * ALIGNED
        return place.view(tensor.dtype).view(tensor.shape).copy_(tensor)


def mapped(size: int) -> Tensor:
    """So many bytes in a file that has no name."""
    with disk(), TemporaryFile() as file:
        os.posix_fallocate(file.fileno(), 0, size)  # else a full disk is a bus error, later
        return torch.from_numpy(np.memmap(file, np.uint8, "r+", shape=(size,)))
