"""T5's text encoder with its tokenizer."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import T5EncoderModel, T5Tokenizer

from tokenflow.diffusion.text_encoder import TextEncoder


@dataclass(frozen=True)
class T5Text(TextEncoder):
    """A text encoder and its tokenizer, for prompts of up to `length` tokens.

    Raises:
        ModelError: They are not of one model.
    """

    title = "the tokenizer of T5"
    encoder: T5EncoderModel
    tokenizer: T5Tokenizer
    length: int

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
        tokens = self.tokens(prompts, self.length)
        return self.encoder(tokens).last_hidden_state
