"""RAFT: optical flow by torchvision's network, with weights that the user has."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import pad

from tokenflow.errors import InputError
from tokenflow.propagation.optical_flow import OpticalFlow
from tokenflow.storage.paths import local
from tokenflow.video import Clip

BROKEN = (EOFError, OSError, RuntimeError, SafetensorError, TypeError, pickle.UnpicklingError)
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
    if not weights.is_file():
        raise InputError(
            f"there are no RAFT weights at {weights}; expected a file of torchvision's "
            f"raft_{size} as .pth or .safetensors"
        )
    network: nn.Module = getattr(optical_flow, f"raft_{size}")(weights=None, progress=False)
    with loading(weights, f"raft_{size}"):
        network.load_state_dict(read_weights(weights))
    return network.requires_grad_(False).eval()


@contextmanager
def loading(file: Path, network: str) -> Iterator[None]:
    """A block that loads weights; `InputError` for those that are not this network's."""
    try:
        yield
    except BROKEN as error:
        # torch's own words advise to load pickles that may run code
        tensors_only = isinstance(error, pickle.UnpicklingError)
        reason = "it holds more than tensors, or is damaged" if tensors_only else error
        raise InputError(
            f"{file} does not load as torchvision's {network}: {reason}; give the file of this "
            f"very network, as it was published"
        ) from error


def read_weights(file: Path) -> dict[str, Any]:
    """Tensors by name; a pickle may hold nothing else."""
    if file.suffix == ".safetensors":
        return load_file(file)
    held = torch.load(file, map_location="cpu", weights_only=True)
    if not (isinstance(held, dict) and all(isinstance(name, str) for name in held)):
        raise TypeError(f"expected tensors by name, got a {type(held).__name__}")
    return held
