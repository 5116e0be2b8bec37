"""What a propagation kernel is given and what it returns."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

from tokenflow.propagation.flow.base import OpticalFlow


@dataclass(frozen=True)
class Motion:
    """Where optical flow finds the tokens of a window's frames in their neighbours.

    Attributes:
        displacement: From a token to its place in either neighbour, (x, y), in latent pixels of
            the site.
        inconsistency: How far from the token the flow there and back again ends, in the same
            unit; large where the token is hidden in the neighbour.
    """

    displacement: Float[Tensor, "frames 2 tokens 2"]
    inconsistency: Float[Tensor, "frames 2 tokens"]


@dataclass(frozen=True)
class Window:
    """A run of consecutive frames and the keyframes that it takes its features from.

    Attributes:
        frames: Positions in the clip of the window's frames, ascending.
        keyframes: Positions in the clip of the neighbouring keyframes, ascending.
        neighbours: For each frame two indices into `keyframes`, (frames, 2).
        blend: The weight of each neighbour, (frames, 2), rows sum to 1. A frame with one
            neighbour names it twice, with weights 1 and 0.
        height: Latent pixels of a frame at this site, so that tokens = height × width.
        width: See `height`.
        motion: By optical flow, for a kernel that asks for it.
        site: The attention layer's name.
        step: Of sampling, from 0.
        steps: Of sampling.
    """

    frames: tuple[int, ...]
    keyframes: tuple[int, ...]
    neighbours: Int[Tensor, "frames 2"]
    blend: Float[Tensor, "frames 2"]
    height: int = 0
    width: int = 0
    motion: Motion | None = None
    site: str = ""
    step: int = 0
    steps: int = 1

    def at_site(self, site: str, tokens: int, size: tuple[int, int]) -> Window:
        """The window at a site with so many tokens, of latents of this height and width."""
        height, width = size
        scale = round((height * width / tokens) ** 0.5)
        return dataclasses.replace(self, site=site, height=height // scale, width=width // scale)


@dataclass(frozen=True)
class Correspondence:
    """A sparse row-stochastic matrix: where each token comes from, and with what weight.

    `indices` point into the flattened tokens of the window's keyframes, (keyframe, token);
    `weights` are not negative and sum to 1 over the last axis.
    """

    indices: Int[Tensor, "frames tokens taps"]
    weights: Float[Tensor, "frames tokens taps"]

    def gather(
        self, values: Float[Tensor, "branches keyframes tokens channels"]
    ) -> Float[Tensor, "branches frames tokens channels"]:
        """Each token's weighted mean of the keyframes' values, in every branch.

        What is gathered is summed at once, and not copied.
        """
        if not self.indices.shape[-1]:
            raise ValueError("a correspondence needs at least one tap, got none")
        taps, weights = self.indices.flatten(0, 1), self.weights.flatten(0, 1).to(values.dtype)
        result = [
            embedding_bag(taps, branch, per_sample_weights=weights, mode="sum")
            for branch in values.flatten(1, 2)
        ]
        return torch.stack(result).unflatten(1, self.indices.shape[:2])


class Propagation(ABC):
    """A propagation kernel: finds, for every token of a window, where it is in the keyframes.

    Subclasses are found by their name through the entry point group `tokenflow.propagation`;
    their constructor's typed arguments are their options.
    """

    interface: ClassVar[int] = 2
    """The version of this interface that a plugin was written for."""

    identity_at_keyframes: ClassVar[bool] = False
    """Whether it promises that a keyframe's tokens take themselves (or, where features of several
    are the same, one of those), so that keyframes need no propagated pass; the conformance kit
    asks."""

    flow: OpticalFlow | None = None
    """What finds optical flow, if the kernel needs it: then every window has its `motion`."""

    def cache_key(self) -> str:
        """A digest of what answers depend on besides options and features; by default the flow's.

        A kernel that reads files returns a digest of them. A checkpoint is found by it.
        """
        return "" if self.flow is None else self.flow.cache_key()

    @abstractmethod
    def correspond(
        self,
        source: Float[Tensor, "frames tokens channels"],
        keys: Float[Tensor, "keyframes tokens channels"],
        window: Window,
    ) -> Correspondence:
        """A pure function of its tensors, called at every site, step and window.

        Args:
            source: The window's source tokens, as they enter the self-attention.
            keys: The neighbouring keyframes' source tokens at the same site and step.
            window: Positions, neighbours and blend weights, and motion if the kernel has a `flow`.
        """
