"""What a kernel's answer must be: the rules that an answer breaks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from tokenflow.propagation.base import Correspondence
from tokenflow.violations import Violation, require_none

TOLERANCE = 1e-3
"""By how much a row's weights may miss 1: what half precision leaves of a sum of a few."""


def check_correspondence(
    found: object,
    source: Float[Tensor, "frames tokens channels"],
    keys: Float[Tensor, "keyframes tokens channels"],
    who: str,
) -> None:
    """Raises `PluginError` unless a correspondence is a row-stochastic matrix over the keys.

    Args:
        found: What a kernel returned.
        source: The window's source tokens, as the kernel was given them.
        keys: The keyframes' source tokens, likewise.
        who: The kernel and the site.
    """
    require_none(violations(found, source, keys), who)


def violations(
    found: object,
    source: Float[Tensor, "frames tokens channels"],
    keys: Float[Tensor, "keyframes tokens channels"],
) -> Iterator[Violation]:
    """The rules that an answer breaks: "form", "device", "dtype", "range", "sign", "rows".

    The last three are about numbers, and are looked at only where the others are kept.
    """
    broken = list(of_tensors(found, source))
    yield from broken
    if broken or not isinstance(found, Correspondence):
        return
    indices, weights = found.indices, found.weights
    last = keys.shape[0] * keys.shape[1] - 1
    low, high = int(indices.min()), int(indices.max())
    if low < 0 or high > last:
        yield Violation(
            "range", f"indices from 0 to {last} (keyframes x tokens)", f"{low} to {high}",
            "they point into the flattened (keyframe, token) pairs of the keys that are given",
        )  # fmt: skip
    if not (weights >= 0).all():
        yield Violation(
            "sign", "weights of 0 or more", f"{float(weights.min()):.4g}",
            "a token is a weighted mean of others: clamp or leave out what is negative or NaN",
        )  # fmt: skip
    sums = weights.float().sum(dim=-1)
    if not ((sums - 1).abs() <= TOLERANCE).all():
        yield Violation(
            "rows", "rows of weights that sum to 1",
            f"sums from {sums.min():.4g} to {sums.max():.4g}",
            "divide the weights by their sum over the last axis",
        )  # fmt: skip


def of_tensors(
    found: object, source: Float[Tensor, "frames tokens channels"]
) -> Iterator[Violation]:
    """The rules of form, device and dtype."""
    if not isinstance(found, Correspondence):
        yield Violation(
            "form", "a Correspondence", type(found).__name__,
            "return tokenflow.propagation.Correspondence(indices, weights)",
        )  # fmt: skip
        return
    both = {"indices": found.indices, "weights": found.weights}
    for name, value in both.items():
        if not isinstance(value, Tensor):
            advice = "convert them with torch.as_tensor"
            yield Violation("form", f"{name} in a tensor", type(value).__name__, advice)
            return
    rows = tuple(source.shape[:2])
    for name, value in both.items():
        if value.ndim != 3 or value.shape[:2] != rows or value.shape[2] < 1:
            yield Violation(
                "form", f"{name} of shape ({rows[0]}, {rows[1]}, taps)", tuple(value.shape),
                "every token of every frame of the window needs at least one tap",
            )  # fmt: skip
        if value.device != source.device:
            yield Violation(
                "device", f"{name} on {source.device}, as the tokens are", value.device,
                "make them on the device of `source`; the window's tensors are on the CPU",
            )  # fmt: skip
    if found.indices.shape != found.weights.shape:
        shapes = f"{tuple(found.indices.shape)}, {tuple(found.weights.shape)}"
        advice = "every tap has one index and one weight"
        yield Violation("form", "as many indices as weights", shapes, advice)
    if found.indices.dtype not in (torch.int64, torch.int32):
        yield Violation(
            "dtype", "indices of dtype int64", found.indices.dtype, "convert them with .long()"
        )
    if not found.weights.is_floating_point():
        yield Violation(
            "dtype", "weights of a floating point dtype", found.weights.dtype,
            "convert them with .float()",
        )  # fmt: skip
