"""LPIPS: how different frames look to a network's features."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokenflow.errors import InputError
from tokenflow.private_names import lpips_network
from tokenflow.storage.paths import local
from tokenflow.storage.weights import load_torchvision

SMALLEST = 35
"""Pixels of a side, of which AlexNet's last pooling leaves one."""


def load_lpips(weights: str, device: str = "cpu") -> nn.Module:
    """LPIPS on AlexNet, as torchmetrics has it, whose file of linear layers comes with it.

    Args:
        weights: torchvision's weights of AlexNet, as it publishes them (.pth) or as .safetensors.
        device: Where it runs.

    Raises:
        InputError: torchvision is missing, or the file is, or does not fit.
    """
    try:
        network = lpips_network()
    except (ImportError, RuntimeError) as error:  # built for another torch, it is a RuntimeError
        raise InputError(
            f"LPIPS needs torchvision, which does not import ({error}); install it with: "
            f"pip install 'tokenflow[lpips]'"
        ) from error
    # slice1.0.weight is features.0.weight
    load_torchvision(
        network.net, local(weights), "alexnet", lambda name: f"features.{name.split('.', 1)[1]}"
    )
    return network.to(device)


@torch.no_grad()
def lpips(
    network: nn.Module,
    a: Float[Tensor, "frames 3 height width"],
    b: Float[Tensor, "frames 3 height width"],
) -> Float[Tensor, " frames"]:
    """Distance of each frame's normalised AlexNet features, weighted as people were found to:

        Σ_l mean over places p of Σ_c w_lc (â_lc(p) - b̂_lc(p))²,

    â_l and b̂_l the features of layer l, of length 1 over channels c, w_lc >= 0 the learned weights.
    No unit, from 0 (equal), seldom above 1. Sides of 35 pixels or more. Blind to motion, and, for
    an edit, to whether a difference from the source was asked for.
    Source: Zhang et al. 2018 (arXiv 1801.03924), equation 1.
    """
    device = next(network.parameters()).device
    pairs = zip(a.to(device).split(8), b.to(device).split(8), strict=True)  # for memory
    return torch.cat([network(*pair, normalize=True).flatten() for pair in pairs]).cpu()
