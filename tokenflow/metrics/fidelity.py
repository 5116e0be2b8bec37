"""How near frames are to others, pixel by pixel: PSNR and SSIM."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

EDGE = 5
"""Pixels from the middle of SSIM's window to its edge."""


def psnr(
    a: Float[Tensor, "*shape"],
    b: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "frames height width"] | None = None,
) -> float:
    """Peak signal-to-noise ratio of images in 0..1:

        -10 log10 (mean over frames, pixels p outside of the mask and channels of (a(p) - b(p))²).

    Unit dB; 0 (black against white) to infinity (equal), NaN where the mask leaves nothing. Outside
    of a mask of what is edited, it measures what the edit should preserve. Blind to where an
    error is: a shift of one pixel may cost more than an object that is missing.
    Source: the usual one, 10 log10 (MAX² / MSE) with MAX = 1 (Huynh-Thu and Ghanbari 2008), of a
    whole clip: not the mean over frames of each one's PSNR, which some papers report.
    """
    squared = (a - b).square()
    return decibels(float((squared if mask is None else squared.mean(dim=1)[~mask]).mean()))


def decibels(error: float) -> float:
    """The PSNR in dB of a mean squared error of images in 0..1; infinite for 0, NaN for NaN."""
    return math.inf if error == 0 else -10 * math.log10(error)


def ssim(
    a: Float[Tensor, "frames 3 height width"], b: Float[Tensor, "frames 3 height width"]
) -> Float[Tensor, " frames"]:
    """Structural similarity of each frame: the mean over windows and channels of

        (2 μa μb + C1) (2 σab + C2) / ((μa² + μb² + C1) (σa² + σb² + C2)),

    with means and covariances under a Gaussian of σ = 1.5 pixels in a window of 11x11, C1 = 0.01²,
    C2 = 0.03². No unit, -1..1, 1 for equal frames. Frames are of 11x11 pixels or more. Blind to
    what lies beyond its window, and to colour, whose channels it takes one by one.
    Source: Wang et al. 2004, Image quality assessment, equation 13.
    """
    scores = []
    for some, others in zip(a.split(8), b.split(8), strict=True):  # for memory
        _, everywhere = structural_similarity_index_measure(
            some, others, data_range=1.0, reduction="none", return_full_image=True
        )
        # windows that lie inside, as in the paper; torchmetrics' own mean also has mirrored ones
        scores.append(everywhere[..., EDGE:-EDGE, EDGE:-EDGE].mean(dim=(1, 2, 3)))
    return torch.cat(scores)
