"""Prompt-to-Prompt (Hertz et al. 2022, arXiv 2208.01626): the source's layout by its attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tokenflow.diffusion import Backbone, Site, Source
from tokenflow.editors import Batch, Editor, Prompts, Step
from tokenflow.errors import InputError


class PromptToPrompt(Editor):
    """The edit attends to its prompt's words where the source attends to its own.

    Args:
        source_prompt: What the source shows, word for word the edit's prompt but for the words
            that are exchanged.
        share: Of the steps, 0 to 1, in which the maps are the source's.
    """

    interface = 2

    def __init__(self, source_prompt: str = "a ball", share: float = 0.8) -> None:
        if not 0 <= share <= 1:
            raise InputError(f"share is a share of the steps from 0 to 1, got {share}")
        self.source_prompt, self.share = source_prompt, share

    def branches(self, prompts: Prompts) -> Mapping[str, str]:
        return {
            "source": prompts.inversion_prompt,
            "layout": self.source_prompt,
            "negative": prompts.negative_prompt,
            "prompt": prompts.prompt,
        }

    def inputs(self, x: Tensor, step: Step, source: Source) -> Tensor:
        inverted = source.at(step.index).to(x)
        return torch.stack([inverted, inverted, x, x])

    def cross_attention(self, model: Backbone) -> Mapping[str, Any]:
        return {name: self.attend for name in model.cross_attention()}

    def attend(self, batch: Batch, site: Site, hidden_states: Tensor, *_: Any, **given: Any) -> Any:
        queries, keys, values = site.qkv(hidden_states, **given)
        if batch.progress < self.share:
            # queries and keys make the maps, which are then never held in memory
            queries, keys = (self.as_layout(x, batch.branches) for x in (queries, keys))
        attended = scaled_dot_product_attention(queries, keys, values, scale=site.scale)
        return site.output(attended, **given)

    def as_layout(self, x: Tensor, branches: tuple[str, ...]) -> Tensor:
        """The layout's queries or keys in place of the prompt's: (branches × frames, ...)."""
        of = dict(zip(branches, x.chunk(len(branches)), strict=True))
        return torch.cat([*(of | {"prompt": of["layout"]}).values()])
