"""RAFT: optical flow by torchvision's network, with weights that the user has."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import pad

from tokenflow.errors import InputError
from tokenflow.propagation.flow.base import OpticalFlow
from tokenflow.storage.paths import local
from tokenflow.storage.weights import load_torchvision
from tokenflow.video import Clip

SMALLEST = 128
"""Pixels of a side: the coarsest of the network's four correlation levels needs two by two."""


class RAFT(OpticalFlow):
    """Recurrent all-pairs field transforms, torchvision's: slower than DIS, and more exact.

    Source: Teed and Deng 2020 (arXiv 2003.12039).

    Args:
        weights: torchvision's weights of RAFT, as it publishes them (.pth) or as .safetensors.
        size: Which of the two networks these belong to, "large" or "small".
        updates: Refinements of the flow; torchvision's own evaluations take 12 to 32.
        device: Where it runs: "auto" takes an accelerator if there is one, else the CPU. Flow knows
            nothing of the trainer: with `--trainer.accelerator cpu` say "cpu" here too.
    """

    def __init__(
        self,
        weights: str,
        size: Literal["large", "small"] = "large",
        updates: int = 12,
        device: str = "auto",
    ) -> None:
        if size not in ("large", "small"):
            raise InputError(f"size must be 'large' or 'small', got {size!r}")
        if updates < 1:
            raise InputError(f"updates must be at least 1, got {updates}")
        self.weights, self.size, self.updates = local(weights), size, updates
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        self.device = str(accelerator or "cpu") if device == "auto" else device
        self.network: nn.Module | None = None

    def prepare(self, clip: Clip) -> None:
        if self.network is None:
            self.network = load_network(self.size, self.weights).to(self.device)

    @torch.no_grad()
    def between(self, clip: Clip, start: int, end: int) -> Float[Tensor, "2 height width"]:
        self.prepare(clip)
        assert self.network is not None, "prepare loads it"
        height, width = clip.frames.shape[-2:]
        right, bottom = (max(SMALLEST, -(-side // 8) * 8) - side for side in (width, height))
        frames = 2 * torch.stack([clip.frame(start), clip.frame(end)]).to(self.device) - 1
        first, second = pad(frames, (0, right, 0, bottom), mode="replicate").split(1)
        flow = self.network(first, second, num_flow_updates=self.updates)[-1][0]
        return flow[:, :height, :width].float().cpu()


def load_network(size: str, weights: Path) -> nn.Module:
    """The network with its weights.

    Raises:
        InputError: torchvision is missing, or the file is, or does not fit the network.
    """
    try:
        from torchvision.models import optical_flow
    except (ImportError, RuntimeError) as error:  # built for another torch, it is a RuntimeError
        raise InputError(
            f"RAFT needs torchvision beside the installed torch {torch.__version__}, which does "
            f"not import ({error}); install it with: pip install 'tokenflow[raft]'"
        ) from error
    network: nn.Module = getattr(optical_flow, f"raft_{size}")(weights=None, progress=False)
    load_torchvision(network, weights, f"raft_{size}")
    return network.requires_grad_(False).eval()
