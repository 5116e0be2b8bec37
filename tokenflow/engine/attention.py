"""The three things that a pass does to a UNet, each for the length of a `with` block.

Self-attention changes through diffusers' public attention processors, editors' edits through
forward hooks. The UNet's batch is always branches × frames, the source branch first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from tokenflow.editors import Edit
from tokenflow.errors import PluginError


@dataclass
class Bank:
    """What a joint pass leaves at every site, for the windows that are propagated from it.

    `source` holds each site's source tokens, (keyframes, tokens, channels), and `outputs` the
    self-attention's output in all branches, (branches, keyframes, tokens, channels), of the
    keyframes that this rank's windows need.
    """

    source: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)

    def evict(self) -> None:
        """Forgets all of it."""
        self.source.clear()
        self.outputs.clear()


class JointAttention:
    """Edited branches attend to all keyframes at once (equation 3), the source to its own frame.

    Args:
        branches: Of the UNet's batch.
        site: Where this is, for the bank.
        bank: Where to leave what was seen here, if anywhere.
        gather: Gives the items of all keyframes, in their order, for those of this rank.
        keep: Gives those that the bank is to have, for those of this rank.
    """

    def __init__(
        self,
        branches: int,
        site: str = "",
        bank: Bank | None = None,
        gather: Callable[[Tensor], Tensor] = lambda own: own,
        keep: Callable[[Tensor], Tensor] = lambda own: own,
    ) -> None:
        self.branches, self.site, self.bank = branches, site, bank
        self.gather, self.keep = gather, keep

    def __call__(
        self, attn: Attention, hidden_states: Tensor, *_: Any, **__: Any
    ) -> Float[Tensor, "batch tokens channels"]:
        b = self.branches
        q, k, v = (
            rearrange(project(hidden_states), "(b f) s (h d) -> b f h s d", b=b, h=attn.heads)
            for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        frames = q.shape[1]
        attended = [scaled_dot_product_attention(q[0], k[0], v[0], scale=attn.scale)]
        edited = self.gather(rearrange([k[1:], v[1:]], "two b f h s d -> f two b h s d"))
        # the frames are folded into the sequence: four dimensions keep the fused kernels
        keys, values = rearrange(edited, "f two b h s d -> two b 1 h (f s) d")
        for query, key, value in zip(q[1:], keys, values, strict=True):
            asked = rearrange(query, "f h s d -> 1 h (f s) d")
            out = scaled_dot_product_attention(asked, key, value, scale=attn.scale)
            attended.append(rearrange(out, "1 h (f s) d -> f h s d", f=frames))
        output = project_out(attn, rearrange(torch.cat(attended), "n h s d -> n s (h d)"))
        if self.bank is not None:
            outputs = rearrange(output, "(b f) s c -> f b s c", b=b)
            seen = torch.cat([hidden_states[:frames, None], outputs], dim=1)
            source, outputs = self.keep(seen).split([1, b], dim=1)
            self.bank.source[self.site] = source[:, 0]
            self.bank.outputs[self.site] = outputs.transpose(0, 1)
        return output


class PropagatedAttention:
    """No attention: every token takes the keyframes' outputs at its correspondence (equation 6)."""

    def __init__(
        self,
        branches: int,
        take: Callable[
            [Float[Tensor, "frames tokens channels"]],
            Float[Tensor, "branches frames tokens channels"],
        ],
    ) -> None:
        self.branches, self.take = branches, take

    def __call__(
        self, attn: Attention, hidden_states: Tensor, *_: Any, **__: Any
    ) -> Float[Tensor, "batch tokens channels"]:
        source = hidden_states[: len(hidden_states) // self.branches]
        return self.take(source).flatten(0, 1)


def project_out(attn: Attention, attended: Tensor) -> Tensor:
    """The layers of an attention module after attention itself."""
    linear, dropout = attn.to_out
    return dropout(linear(attended)) / attn.rescale_output_factor


def self_attention_sites(unet: UNet2DConditionModel) -> list[str]:
    """The names of all self-attention layers, in the order of diffusers' processors."""
    return [name for name in unet.attn_processors if name.endswith("attn1.processor")]


@contextmanager
def processors(unet: UNet2DConditionModel, make: Callable[[str], Any]) -> Iterator[None]:
    """Gives every self-attention site the processor `make(site)`; puts the old ones back."""
    before = dict(unet.attn_processors)
    changed = {site: make(site) for site in self_attention_sites(unet)}
    try:
        unet.set_attn_processor({**before, **changed})
        yield
    finally:
        unet.set_attn_processor(before)


@contextmanager
def installed(edits: Iterable[Edit], branches: int) -> Iterator[None]:
    """Hooks the editor's edits into their modules; takes them out again."""

    def hook(edit: Edit) -> Callable[[nn.Module, Any, Any], Tensor]:
        def apply(module: nn.Module, inputs: Any, output: Any) -> Tensor:
            if not isinstance(output, Tensor):
                raise PluginError(
                    f"an edit's module must put out a tensor: expected another than "
                    f"{type(module).__name__}, got {type(output).__name__}; the editor is to be "
                    f"mended: edit a module inside it"
                )
            source, *edited = output.chunk(branches)
            return torch.cat([source, edit.function(torch.stack(edited), source).flatten(0, 1)])

        return apply

    with ExitStack() as stack:
        for edit in edits:
            stack.enter_context(edit.module.register_forward_hook(hook(edit)))
        yield
