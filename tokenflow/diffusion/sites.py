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
    matched: bool = True
    """Whether what tokens show decides which ones match, so that outputs can be propagated. If
    False, their place decides; frames then attend on their own in propagated passes."""

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

    def text_qkv(self, hidden_states: Float[Tensor, "batch tokens channels"], **given: Any) -> QKV:
        """As `qkv`, with the queries of text tokens alone."""
        query, key, value = self.qkv(hidden_states, **given)
        return query[:, :, self.image(hidden_states, **given).shape[1] :], key, value

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


class SiteProcessor:
    """What diffusers calls, with the layer and its inputs, in place of a site's own processor.

    A class, since diffusers inspects its processor's signature at each call, and that of a partial
    function takes ten times as long to find.
    """

    def __init__(self, site: Site, by: Replacement) -> None:
        self.site, self.by = site, by

    def __call__(self, _: nn.Module, hidden_states: Tensor, *args: Any, **given: Any) -> Any:
        return self.by.attention(self.site, hidden_states, *args, **given)


class ProcessorSite(Site):
    """An attention layer of diffusers, by its public attention processors."""

    processor: ClassVar[type[SiteProcessor]] = SiteProcessor

    def __init__(self, name: str, layer: Any) -> None:
        super().__init__(name)
        self.layer, self.own = layer, layer.processor

    def plain(self, hidden_states: Tensor, *args: Any, **given: Any) -> Any:
        return self.own(self.layer, hidden_states, *args, **given)

    @contextmanager
    def replaced(self, by: Replacement) -> Iterator[None]:
        self.own = self.layer.processor
        self.layer.set_processor(self.processor(self, by))
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
        query = normed(self.layer.norm_q, self.heads(self.layer.to_q(hidden_states)))
        return query, *self.key_value(context)

    def key_value(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Of the tokens that are attended to."""
        key, value = self.heads(self.layer.to_k(tokens)), self.heads(self.layer.to_v(tokens))
        return normed(self.layer.norm_k, key), value

    def heads(self, projected: Tensor) -> Tensor:
        """Projected tokens as (batch, heads, tokens, width)."""
        return rearrange(projected, "n s (h d) -> n h s d", h=self.layer.heads)

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
        return in_sequence(super().qkv(hidden_states), self.text(encoder_hidden_states))

    def text_qkv(
        self,
        hidden_states: Float[Tensor, "batch image_tokens channels"],
        encoder_hidden_states: Float[Tensor, "batch text_tokens channels"] | None = None,
        **_: Any,
    ) -> QKV:
        query, *text = self.text(encoder_hidden_states)
        image = self.key_value(hidden_states)
        key, value = (torch.cat(two, dim=2) for two in zip(image, text, strict=True))
        return query, key, value

    def text(self, tokens: Tensor | None) -> QKV:
        """Queries, keys and values of text tokens."""
        assert tokens is not None, "diffusers' block always gives them"
        layer = self.layer
        query, key, value = (
            self.heads(project(tokens))
            for project in (layer.add_q_proj, layer.add_k_proj, layer.add_v_proj)
        )
        return normed(layer.norm_added_q, query), normed(layer.norm_added_k, key), value

    def joined(
        self,
        output: Float[Tensor, "batch image_tokens channels"],
        text: Float[Tensor, "batch heads text_tokens width"],
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        beside = rearrange(text, "n h s d -> n s (h d)")
        # the last block uses no text any more, and has no projection
        return output, beside if self.layer.context_pre_only else self.layer.to_add_out(beside)


class FluxProcessor(SiteProcessor):
    """Flux's blocks give all inputs by position."""

    def __call__(
        self,
        _: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Any:
        return self.by.attention(
            self.site,
            hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            image_rotary_emb=image_rotary_emb,
        )


class FluxSite(ProcessorSite):
    """Joint attention of Flux's double blocks, with rotary positions of text tokens, then image.

    Text tokens have projections and norms of their own, and enter as `encoder_hidden_states`.
    """

    has_text = True
    layer: FluxAttention
    processor = FluxProcessor

    def heads(self, projected: Tensor) -> Tensor:
        """Projected tokens as (batch, heads, tokens, width)."""
        return rearrange(projected, "n s (h d) -> n h s d", d=self.layer.head_dim)

    def query(self, hidden_states: Tensor) -> Tensor:
        """Of tokens that enter as `hidden_states`, without their positions."""
        query: Tensor = self.layer.norm_q(self.heads(self.layer.to_q(hidden_states)))
        return query

    def key_value(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """The same."""
        layer = self.layer
        key, value = self.heads(layer.to_k(hidden_states)), self.heads(layer.to_v(hidden_states))
        return layer.norm_k(key), value

    def text(self, tokens: Tensor | None) -> QKV:
        """Queries, keys and values of text tokens, without their positions."""
        assert tokens is not None, "diffusers' block always gives them"
        layer = self.layer
        query, key, value = (
            self.heads(project(tokens))
            for project in (layer.add_q_proj, layer.add_k_proj, layer.add_v_proj)
        )
        return layer.norm_added_q(query), layer.norm_added_k(key), value

    def qkv(
        self,
        hidden_states: Float[Tensor, "batch image_tokens channels"],
        encoder_hidden_states: Float[Tensor, "batch text_tokens channels"] | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        **_: Any,
    ) -> QKV:
        text, own = self.text(encoder_hidden_states), self.key_value(hidden_states)
        both = in_sequence(text, (self.query(hidden_states), *own))
        return image_first(both, image_rotary_emb, text[0].shape[2])

    def text_qkv(
        self,
        hidden_states: Float[Tensor, "batch image_tokens channels"],
        encoder_hidden_states: Float[Tensor, "batch text_tokens channels"] | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        **_: Any,
    ) -> QKV:
        query, *text = self.text(encoder_hidden_states)
        pairs = zip(text, self.key_value(hidden_states), strict=True)
        key, value = (torch.cat(two, dim=2) for two in pairs)
        return text_alone(query, key, value, image_rotary_emb)

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
        every = self.query(hidden_states), *self.key_value(hidden_states)
        return image_first(every, image_rotary_emb, self.texts())

    def text_qkv(
        self,
        hidden_states: Float[Tensor, "batch tokens channels"],
        encoder_hidden_states: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        **_: Any,
    ) -> QKV:
        query = self.query(hidden_states[:, : self.texts()])
        return text_alone(query, *self.key_value(hidden_states), image_rotary_emb)

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
    query, key = positioned(query, rotary), positioned(key, rotary)
    q, k, v = (x.roll(-texts, dims=2) for x in (query, key, value))
    return q, k, v


def text_alone(
    query: Tensor, key: Tensor, value: Tensor, rotary: tuple[Tensor, Tensor] | None
) -> QKV:
    """As `image_first`, of the text tokens' queries alone."""
    texts = query.shape[2]
    key, value = (x.roll(-texts, dims=2) for x in (positioned(key, rotary), value))
    return positioned(query, rotary), key, value


def positioned(tokens: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
    """Queries or keys with their rotary positions, those of the first tokens."""
    if rotary is None:
        return tokens
    cosines, sines = (x[: tokens.shape[2]] for x in rotary)
    result: Tensor = apply_rotary_emb(tokens, (cosines, sines), sequence_dim=2)
    return result
