"""T5's text encoder with its tokenizer."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import T5EncoderModel, T5Tokenizer

from tokenflow.diffusion.loading import ModelError


@dataclass(frozen=True)
class T5Text:
    """A text encoder and its tokenizer, for prompts of up to `length` tokens.

    Raises:
        ModelError: They are not of one model.
    """

    encoder: T5EncoderModel
    tokenizer: T5Tokenizer
    length: int

    def __post_init__(self) -> None:
        if 2 * len(self.tokenizer) < (words := self.encoder.config.vocab_size):
            raise ModelError(
                f"the tokenizer of T5 knows {len(self.tokenizer)} tokens and the text encoder "
                f"{words}: prompts would be ignored; give the model its own, whole tokenizer"
            )

    @property
    def width(self) -> int:
        """Of an embedding."""
        return int(self.encoder.config.d_model)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Float[Tensor, "prompts tokens width"]:
        """The last hidden state; prompts are padded, and none of the padding is masked.

        A prompt that is cut gives a warning.
        """
        for prompt in prompts:
            count = len(self.tokenizer(prompt, verbose=False)["input_ids"])
            if count > self.length:
                warnings.warn(
                    f"T5 takes at most {self.length} tokens, got {count}; the end is cut off of "
                    f"{prompt!r}",
                    stacklevel=1,
                )
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=self.length,
            return_tensors="pt",
        )
        return self.encoder(tokens["input_ids"].to(self.encoder.device)).last_hidden_state

    @property
    def vocabulary(self) -> tuple[Any, Any]:
        """All that tokens depend on, as JSON holds it."""
        tokens = json.loads(self.tokenizer.backend_tokenizer.to_str())
        for state in ("padding", "truncation"):  # as the last call left them
            del tokens[state]
        return tokens, self.tokenizer.special_tokens_map
