"""Where attention happens in a network, and how."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, runtime_checkable

from diffusers.models.attention_processor import Attention as AttentionLayer
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

Attention = Callable[..., Tensor]
"""In place of a layer's attention: `(site, hidden_states, ...)` to the layer's output, with the
further arguments that the layer is called with."""


@runtime_checkable
class Replacement(Protocol):
    """What a layer does in place of its attention, which may change between calls."""

    @property
    def attention(self) -> Attention: ...


class Site(ABC):
    """One attention layer, whose attention can be replaced.

    Args:
        name: The layer's name in the network.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def qkv(
        self, hidden_states: Float[Tensor, "batch tokens channels"], **given: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (batch, heads, tokens, width) each, norms and all included."""

    @abstractmethod
    def output(
        self, attended: Float[Tensor, "batch heads tokens width"], **given: Any
    ) -> Float[Tensor, "batch tokens channels"]:
        """What the layer puts out for attended values."""

    @property
    def scale(self) -> float | None:
        """By which products of queries and keys are multiplied; 1 / √width if None."""
        return None

    @abstractmethod
    def plain(self, hidden_states: Tensor, *args: Any, **given: Any) -> Tensor:
        """What the layer puts out by itself, every frame on its own."""

    @abstractmethod
    def replaced(self, by: Replacement) -> AbstractContextManager[None]:
        """A block in which the layer calls `by.attention(site, hidden_states, ...)`."""


class DiffusersSite(Site):
    """An attention layer of diffusers' UNets, by its public attention processors."""

    def __init__(self, name: str, layer: AttentionLayer) -> None:
        super().__init__(name)
        self.layer, self.own = layer, layer.processor

    def qkv(
        self,
        hidden_states: Float[Tensor, "batch tokens channels"],
        encoder_hidden_states: Float[Tensor, "batch texts width"] | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            rearrange(project(tokens), "n s (h d) -> n h s d", h=self.layer.heads)
            for project, tokens in (
                (self.layer.to_q, hidden_states),
                (self.layer.to_k, context),
                (self.layer.to_v, context),
            )
        )
        return query, key, value

    def output(
        self, attended: Float[Tensor, "batch heads tokens width"], **_: Any
    ) -> Float[Tensor, "batch tokens channels"]:
        linear, dropout = self.layer.to_out
        joined = rearrange(attended, "n h s d -> n s (h d)")
        return dropout(linear(joined)) / self.layer.rescale_output_factor

    @property
    def scale(self) -> float | None:
        return self.layer.scale

    def plain(self, hidden_states: Tensor, *args: Any, **given: Any) -> Tensor:
        return self.own(self.layer, hidden_states, *args, **given)

    @contextmanager
    def replaced(self, by: Replacement) -> Iterator[None]:
        self.own = self.layer.processor

        def process(_: AttentionLayer, hidden_states: Tensor, *args: Any, **given: Any) -> Tensor:
            return by.attention(self, hidden_states, *args, **given)

        self.layer.set_processor(process)
        try:
            yield
        finally:
            self.layer.set_processor(self.own)
