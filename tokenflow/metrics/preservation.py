"""Preservation: how near the edit stays to the source where nothing was to change."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokenflow.metrics.average import Average
from tokenflow.metrics.fidelity import decibels


def preservation(
    edited: Float[Tensor, "frames 3 height width"],
    source: Float[Tensor, "frames 3 height width"],
    mask: Bool[Tensor, "frames height width"],
) -> float:
    """PSNR of edit x and source y over the pixels outside of a mask M of what is edited:

        -10 log10 (mean over frames, over p not in M and over channels of (x(p) - y(p))²).

    Unit dB, 0 to infinity (equal), NaN where the mask leaves nothing; the VAE's round trip is what
    can be had at best. Blind to the object, to what it does to its surroundings inside of the mask,
    and to where an error is.
    Source: our own, `psnr` of the unmasked pixels only.
    """
    return decibels(float(squared_errors(edited, source, mask).mean()))


def squared_errors(
    edited: Float[Tensor, "frames 3 height width"],
    source: Float[Tensor, "frames 3 height width"],
    mask: Bool[Tensor, "frames height width"],
) -> Float[Tensor, " pixels"]:
    """Mean over channels of the squared differences outside of the mask."""
    return (edited - source).square().mean(dim=1)[~mask]


class Preservation(Average):
    """`preservation` over all pixels of all clips."""

    def update(
        self,
        edited: Float[Tensor, "frames 3 height width"],
        source: Float[Tensor, "frames 3 height width"],
        mask: Bool[Tensor, "frames height width"],
    ) -> None:
        self.add(squared_errors(edited, source, mask))

    def compute(self) -> Tensor:
        return torch.tensor(decibels(float(super().compute())), device=self.total.device)
