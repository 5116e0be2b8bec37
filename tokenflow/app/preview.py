"""What predicted clean latents look like, without the VAE: a linear map of latents to RGB."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from tokenflow.diffusion import Backbone
from tokenflow.video import contact_sheet

SHOWN = 3
"""Frames of a preview."""
HEIGHT = 160
"""Pixels of its frames."""


class LinearDecoder:
    """Latents to RGB by one matrix, fitted by least squares to a VAE's codes of smooth colours.

    Args:
        model: Whose VAE it is.
    """

    @torch.no_grad()
    def __init__(self, model: Backbone) -> None:
        side = model.multiple * max(1, 128 // model.multiple)
        coarse = torch.rand(8, 3, 5, 5, generator=torch.Generator().manual_seed(0))
        frames = interpolate(coarse, (side, side), mode="bilinear").clamp(0, 1)
        latents = torch.cat([model.encode(frame[None]).cpu().float() for frame in frames])
        colours = avg_pool2d(frames, model.latent_scale)
        rows = with_one(latents.movedim(1, -1).flatten(0, -2))
        self.matrix = torch.linalg.lstsq(rows, colours.movedim(1, -1).flatten(0, -2)).solution

    def __call__(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 h w"]:
        """Frames in 0..1 at the latents' size."""
        return (with_one(latents.float().movedim(1, -1)) @ self.matrix).movedim(-1, 1).clamp(0, 1)

    def preview(self, latents: Float[Tensor, "frames c h w"]) -> Float[Tensor, "3 height width"]:
        """The first, the middle and the last frame beside each other."""
        count = min(len(latents), SHOWN)
        some = torch.linspace(0, len(latents) - 1, count).round().long()
        images, width = self(latents[some]), latents.shape[-1] * HEIGHT // latents.shape[-2]
        return contact_sheet([interpolate(images, (HEIGHT, width), mode="bicubic").clamp(0, 1)])


def with_one(rows: Tensor) -> Tensor:
    """Vectors with a 1 behind them, for the constant of a linear map."""
    return torch.cat([rows, torch.ones_like(rows[..., :1])], dim=-1)
