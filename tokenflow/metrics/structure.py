"""Structure: whether the edit has its edges where the source has them."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import max_pool2d

from tokenflow.video import luma


def structure(
    edited: Float[Tensor, "frames 3 height width"],
    source: Float[Tensor, "frames 3 height width"],
    mask: Bool[Tensor, "frames height width"] | None = None,
) -> Float[Tensor, " frames"]:
    """Pearson's correlation over pixels of each frame's edge strengths in edit and source: of |∇Y|,
    Y the luma and ∇ its central differences. Left out are the mask and the pixels beside it.

    No unit, -1..1: 1 for edges of the same places and relative strengths, whatever their colours,
    their brightness or which side is the brighter; 0 for unrelated ones, and where the frame has
    none; NaN where the mask leaves no pixel. Blind to colour, to smooth shading, and to what moves
    by less than a pixel.
    Source: our own, in place of the self-similarity of a network that would be needed for it.
    """
    scores = []
    if mask is not None:
        mask = max_pool2d(mask.float(), 3, stride=1, padding=1) > 0
    for frame, pair in enumerate(zip(edited, source, strict=True)):
        outside = slice(None) if mask is None else ~mask[frame]
        strengths = torch.stack([edges(luma(image))[outside].flatten().double() for image in pair])
        a, b = strengths - strengths.mean(dim=1, keepdim=True)
        lengths = a.norm() * b.norm()
        score = a @ b / lengths if lengths > 0 else lengths
        scores.append((score if len(a) else score.new_tensor(torch.nan)).float())
    return torch.stack(scores)


def edges(brightness: Float[Tensor, "height width"]) -> Float[Tensor, "height width"]:
    """The length of the gradient, per pixel."""
    return torch.stack(torch.gradient(brightness)).norm(dim=0)
