"""Where attention happens in a network, and how."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from diffusers.models.attention_processor import Attention as AttentionLayer
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttention
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

QKV = tuple[Tensor, Tensor, Tensor]
Attention = Callable[..., Any]
"""In place of a layer's attention: `(site, hidden_states, ...)` to the layer's output, with the
further arguments that the layer is called with."""


@runtime_checkable
class Replacement(Protocol):
    """What a layer does in place of its attention, which may change between calls."""

    @property
    def attention(self) -> Attention: ...


class Site(ABC):
    """One attention layer, whose attention can be replaced.

    Its tokens are a frame's own, the image tokens. In transformers such as those of SD 3 and Flux
    they attend in one sequence with the prompt's, the text tokens; `has_text` is then true.

    Args:
        name: The layer's name in the network.
    """

    has_text: ClassVar[bool] = False
    """Whether the layer's sequence holds text tokens besides the image tokens."""

    def __init__(self, name: str) -> None:
        self.name = name

    def image(
        self, hidden_states: Float[Tensor, "batch tokens channels"], **given: Any
    ) -> Float[Tensor, "batch image_tokens channels"]:
        """The image tokens among those that enter the layer; all by default."""
        return hidden_states

    @abstractmethod
    def qkv(self, hidden_states: Float[Tensor, "batch tokens channels"], **given: Any) -> QKV:
        """Queries, keys and values, (batch, heads, tokens, width) each, norms and all included.

        Image tokens come first, then text tokens, whatever the order in the network.
        """

    @abstractmethod
    def output(
        self, attended: Float[Tensor, "batch heads image_tokens width"], **given: Any
    ) -> Float[Tensor, "batch image_tokens channels"]:
        """What the layer puts out for image tokens, of their attended values."""

    def joined(
        self,
        output: Float[Tensor, "batch image_tokens channels"],
        text: Float[Tensor, "batch heads text_tokens width"],
        **given: Any,
    ) -> Any:
        """What the layer returns to its block.

        Args:
            output: Of the image tokens, all that is returned by default.
            text: The text tokens' attended values; none where `has_text` is false.
            given: What the layer was called with.
        """
        return output

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


class ProcessorSite(Site):
    """An attention layer of diffusers, by its public attention processors."""

    def __init__(self, name: str, layer: Any) -> None:
        super().__init__(name)
        self.layer, self.own = layer, layer.processor

    def plain(self, hidden_states: Tensor, *args: Any, **given: Any) -> Any:
        return self.own(self.layer, hidden_states, *args, **given)

    def processor(self, by: Replacement) -> Callable[..., Any]:
        """What diffusers calls in place of the layer's own processor."""

        def process(_: nn.Module, hidden_states: Tensor, *args: Any, **given: Any) -> Any:
            return by.attention(self, hidden_states, *args, **given)

        return process

    @contextmanager
    def replaced(self, by: Replacement) -> Iterator[None]:
        self.own = self.layer.processor
        self.layer.set_processor(self.processor(by))
        try:
            yield
        finally:
            self.layer.set_processor(self.own)


class DiffusersSite(ProcessorSite):
    """An attention layer whose sequence holds image tokens alone, as those of UNets.

    Products of queries and keys are to be summed in float32, as SD 2.1's `upcast_attention` asks,
    which PyTorch's `scaled_dot_product_attention` does for every dtype.
    """

    layer: AttentionLayer

    def qkv(
        self,
        hidden_states: Float[Tensor, "batch tokens channels"],
        encoder_hidden_states: Float[Tensor, "batch texts width"] | None = None,
        **_: Any,
    ) -> QKV:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            rearrange(project(tokens), "n s (h d) -> n h s d", h=self.layer.heads)
            for project, tokens in (
                (self.layer.to_q, hidden_states),
                (self.layer.to_k, context),
                (self.layer.to_v, context),
            )
        )
        return normed(self.layer.norm_q, query), normed(self.layer.norm_k, key), value

    def output(
        self, attended: Float[Tensor, "batch heads tokens width"], **_: Any
    ) -> Float[Tensor, "batch tokens channels"]:
        linear, dropout = self.layer.to_out
        joined = rearrange(attended, "n h s d -> n s (h d)")
        return dropout(linear(joined)) / self.layer.rescale_output_factor

    @property
    def scale(self) -> float | None:
        return self.layer.scale


class StableDiffusion3Site(DiffusersSite):
    """Joint attention of SD 3 (Esser et al. 2024, arXiv 2403.03206): image tokens, then text.

    Text tokens have projections and norms of their own, and enter as `encoder_hidden_states`.
    """

    has_text = True

    def qkv(
        self,
        hidden_states: Float[Tensor, "batch image_tokens channels"],
        encoder_hidden_states: Float[Tensor, "batch text_tokens channels"] | None = None,
        **_: Any,
    ) -> QKV:
        assert encoder_hidden_states is not None, "diffusers' block always gives them"
        layer = self.layer
        query, key, value = (
            rearrange(project(encoder_hidden_states), "n s (h d) -> n h s d", h=layer.heads)
            for project in (layer.add_q_proj, layer.add_k_proj, layer.add_v_proj)
        )
        text = normed(layer.norm_added_q, query), normed(layer.norm_added_k, key), value
        return in_sequence(super().qkv(hidden_states), text)

    def joined(
        self,
        output: Float[Tensor, "batch image_tokens channels"],
        text: Float[Tensor, "batch heads text_tokens width"],
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        beside = rearrange(text, "n h s d -> n s (h d)")
        # the last block uses no text any more, and has no projection
        return output, beside if self.layer.context_pre_only else self.layer.to_add_out(beside)


class FluxSite(ProcessorSite):
    """Joint attention of Flux's double blocks, with rotary positions of text tokens, then image.

    Text tokens have projections and norms of their own, and enter as `encoder_hidden_states`.
    """

    has_text = True
    layer: FluxAttention

    def processor(self, by: Replacement) -> Callable[..., Any]:
        def process(
            _: nn.Module,
            hidden_states: Tensor,
            encoder_hidden_states: Tensor | None = None,
            attention_mask: Tensor | None = None,
            image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        ) -> Any:
            return by.attention(
                self,
                hidden_states,
                encoder_hidden_states=encoder_hidden_states,
                image_rotary_emb=image_rotary_emb,
            )

        return process

    def heads(self, *projected: Tensor) -> list[Tensor]:
        """Of projected tokens, (batch, heads, tokens, width)."""
        return [rearrange(x, "n s (h d) -> n h s d", d=self.layer.head_dim) for x in projected]

    def own_qkv(self, hidden_states: Tensor) -> QKV:
        """Of the tokens that enter as `hidden_states`, without their positions."""
        layer = self.layer
        projections = (layer.to_q, layer.to_k, layer.to_v)
        query, key, value = self.heads(*(project(hidden_states) for project in projections))
        return layer.norm_q(query), layer.norm_k(key), value

    def qkv(
        self,
        hidden_states: Float[Tensor, "batch image_tokens channels"],
        encoder_hidden_states: Float[Tensor, "batch text_tokens channels"] | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        **_: Any,
    ) -> QKV:
        layer = self.layer
        projections = (layer.add_q_proj, layer.add_k_proj, layer.add_v_proj)
        query, key, value = self.heads(*(project(encoder_hidden_states) for project in projections))
        text = layer.norm_added_q(query), layer.norm_added_k(key), value
        both = in_sequence(text, self.own_qkv(hidden_states))
        return image_first(both, image_rotary_emb, query.shape[2])

    def output(
        self, attended: Float[Tensor, "batch heads image_tokens width"], **_: Any
    ) -> Float[Tensor, "batch image_tokens channels"]:
        linear, dropout = self.layer.to_out
        return dropout(linear(rearrange(attended, "n h s d -> n s (h d)")))

    def joined(
        self,
        output: Float[Tensor, "batch image_tokens channels"],
        text: Float[Tensor, "batch heads text_tokens width"],
        **_: Any,
    ) -> Any:
        return output, self.layer.to_add_out(rearrange(text, "n h s d -> n s (h d)"))


class FluxSingleSite(FluxSite):
    """Attention of Flux's single blocks, which text and image tokens enter as one sequence.

    What it puts out is projected by the block, together with an MLP's output.

    Args:
        name: The layer's name in the network.
        layer: The layer.
        texts: How many text tokens come first, which the layer is not given.
    """

    def __init__(self, name: str, layer: FluxAttention, texts: Callable[[], int]) -> None:
        super().__init__(name, layer)
        self.texts = texts

    def image(
        self, hidden_states: Float[Tensor, "batch tokens channels"], **_: Any
    ) -> Float[Tensor, "batch image_tokens channels"]:
        return hidden_states[:, self.texts() :]

    def qkv(
        self,
        hidden_states: Float[Tensor, "batch tokens channels"],
        encoder_hidden_states: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        **_: Any,
    ) -> QKV:
        return image_first(self.own_qkv(hidden_states), image_rotary_emb, self.texts())

    def output(
        self, attended: Float[Tensor, "batch heads image_tokens width"], **_: Any
    ) -> Float[Tensor, "batch image_tokens channels"]:
        return rearrange(attended, "n h s d -> n s (h d)")

    def joined(
        self,
        output: Float[Tensor, "batch image_tokens channels"],
        text: Float[Tensor, "batch heads text_tokens width"],
        **_: Any,
    ) -> Tensor:
        return torch.cat([rearrange(text, "n h s d -> n s (h d)"), output], dim=1)


def normed(norm: nn.Module | None, tokens: Tensor) -> Tensor:
    """The norm of queries or keys, where a layer has one."""
    return tokens if norm is None else norm(tokens)


def in_sequence(first: QKV, then: QKV) -> QKV:
    """Queries, keys and values of two runs of tokens in one sequence."""
    q, k, v = (torch.cat(two, dim=2) for two in zip(first, then, strict=True))
    return q, k, v


def image_first(tokens: QKV, rotary: tuple[Tensor, Tensor] | None, texts: int) -> QKV:
    """Queries and keys with rotary positions, and all tokens with the first, the texts, at the end.

    Args:
        tokens: Queries, keys and values in Flux's order, text tokens first.
        rotary: Cosines and sines of the positions in that order, (tokens, width) each.
        texts: How many are text.
    """
    query, key, value = tokens
    if rotary is not None:
        query, key = (apply_rotary_emb(x, rotary, sequence_dim=2) for x in (query, key))
    q, k, v = (x.roll(-texts, dims=2) for x in (query, key, value))
    return q, k, v
