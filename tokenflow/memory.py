"""Running out of memory, as a sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tokenflow.errors import InputError

SIGNS = ("could not create a primitive", "can't allocate memory", "Cannot allocate memory")
"""Of which oneDNN, PyTorch's allocator on the CPU, and the system speak in other errors."""


def ran_out(error: BaseException) -> bool:
    """Whether an error says that there was not enough memory."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError | OSError) and any(sign in str(error) for sign in SIGNS)
    )


@contextmanager
def explained_shortage(what: str, remedy: str) -> Iterator[None]:
    """A block whose lack of memory becomes an `InputError` that names its purpose and a remedy.

    Raises:
        InputError: There was not enough.
    """
    try:
        yield
    except Exception as error:
        if not ran_out(error):
            raise
        raise InputError(
            f"there is not enough memory {what} ({type(error).__name__}: {error}); {remedy}"
        ) from error
