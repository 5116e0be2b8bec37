"""What one self-attention site saw, for those who want to look at it afterwards."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from tokenflow.propagation import Correspondence, Window


@dataclass(frozen=True)
class Observed:
    """What a site saw at one step of sampling, in host memory.

    Attributes:
        site: The self-attention layer.
        step: Of sampling, from 0.
        steps: How many there are.
        frames: Positions in the clip of some frames, evenly spaced.
        tokens: Their source tokens, as they entered the self-attention.
        parts: The windows that these frames are in, and the correspondence of each.
    """

    site: str
    step: int
    steps: int
    frames: list[int]
    tokens: Float[Tensor, "frames height width channels"]
    parts: list[tuple[Window, Correspondence]]
