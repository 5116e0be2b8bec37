"""What every kernel's answer must be, told to the author of one that is not."""

from __future__ import annotations

from typing import NoReturn

import torch
from jaxtyping import Float
from torch import Tensor

from tokenflow.errors import InputError
from tokenflow.propagation.base import Correspondence

TOLERANCE = 1e-3
"""By how much a row's weights may miss 1: what half precision leaves of a sum of a few."""


def check_correspondence(
    found: object,
    source: Float[Tensor, "frames tokens channels"],
    keys: Float[Tensor, "keyframes tokens channels"],
    who: str,
) -> None:
    """Raises `InputError` unless a correspondence is a row-stochastic matrix over the keys.

    Args:
        found: What a kernel returned.
        source: The window's source tokens, as the kernel was given them.
        keys: The keyframes' source tokens, likewise.
        who: The kernel, and where it was asked.
    """

    def refuse(expected: str, got: object) -> NoReturn:
        raise InputError(f"{who}: expected {expected}, got {got}; the kernel is to be mended")

    if not isinstance(found, Correspondence):
        refuse("a Correspondence", type(found).__name__)
    indices, weights = found.indices, found.weights
    rows, places = tuple(source.shape[:2]), keys.shape[0] * keys.shape[1]
    for name, value in (("indices", indices), ("weights", weights)):
        if value.ndim != 3 or value.shape[:2] != rows or value.shape[2] < 1:
            refuse(f"{name} of shape ({rows[0]}, {rows[1]}, taps)", tuple(value.shape))
        if value.device != source.device:
            refuse(f"{name} on {source.device}, as the tokens are", value.device)
    if indices.shape != weights.shape:
        refuse("as many indices as weights", f"{tuple(indices.shape)}, {tuple(weights.shape)}")
    if indices.dtype not in (torch.int64, torch.int32):
        refuse("indices of dtype int64", indices.dtype)
    if not weights.is_floating_point():
        refuse("weights of a floating point dtype", weights.dtype)
    low, high = int(indices.min()), int(indices.max())
    if low < 0 or high >= places:
        refuse(f"indices from 0 to {places - 1} (keyframes x tokens)", f"{low} to {high}")
    if not (weights >= 0).all():
        refuse("weights of 0 or more", float(weights.min()))
    sums = weights.float().sum(dim=-1)
    if not ((sums - 1).abs() <= TOLERANCE).all():
        refuse("rows of weights that sum to 1", f"sums from {sums.min():.4g} to {sums.max():.4g}")
