"""What the network is given besides latents and a timestep."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


class Conditioning:
    """Named tensors whose leading axis is one row per prompt, or per prompt and frame.

    Stable Diffusion 1 and 2 have "embeddings" (rows, tokens, width); other families add pooled
    embeddings, sizes, or positions of text tokens under the names of their network's arguments.
    """

    def __init__(self, **tensors: Tensor) -> None:
        rows = {name: len(tensor) for name, tensor in tensors.items()}
        if len(set(rows.values())) != 1:
            raise ValueError(f"expected named tensors with as many rows each, got {rows}")
        self.tensors: Mapping[str, Tensor] = tensors

    def __len__(self) -> int:
        """The number of rows."""
        return len(next(iter(self.tensors.values())))

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def map(self, function: Callable[[Tensor], Tensor]) -> Conditioning:
        """The function of every tensor."""
        return Conditioning(**{name: function(tensor) for name, tensor in self.tensors.items()})

    def rows(self, numbers: list[int]) -> Conditioning:
        """Some rows."""
        return self.map(lambda tensor: tensor[numbers])

    def per_frame(self, frames: int) -> Conditioning:
        """Each row once for every frame: (prompts, ...) to (prompts × frames, ...)."""
        return self.map(lambda tensor: tensor.repeat_interleave(frames, dim=0))

    def same_as(self, other: Conditioning) -> bool:
        """Whether names, shapes and values are equal."""
        return self.tensors.keys() == other.tensors.keys() and all(
            torch.equal(tensor, other[name]) for name, tensor in self.tensors.items()
        )
