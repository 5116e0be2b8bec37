"""CLIP's text encoders, each with its tokenizer."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from tokenflow.diffusion.loading import ModelError
from tokenflow.diffusion.text_encoder import TextEncoder


@dataclass(frozen=True)
class CLIPText(TextEncoder):
    """A text encoder and its tokenizer.

    Raises:
        ModelError: They are not of one model.
    """

    encoder: CLIPTextModel | CLIPTextModelWithProjection
    tokenizer: CLIPTokenizer

    @property
    def width(self) -> int:
        """Of an embedding."""
        return int(self.encoder.config.hidden_size)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], **options: Any) -> Any:
        """The encoder's output, as transformers gives it, with `options` of its call.

        Prompts are padded or cut to all its positions; a prompt that is cut gives a warning.
        """
        prompts = [self.spelled(prompt) for prompt in prompts]
        length = self.encoder.config.max_position_embeddings
        for prompt in prompts:
            self.warn_if_cut(prompt, length)
        tokens = self.tokens(prompts, length)
        return self.encoder(tokens, **options)

    @torch.no_grad()
    def add(self, token: str, vectors: Float[Tensor, "count width"]) -> None:
        """Adds a word of several vectors: tokens `word`, `word_1`, … in a row.

        Raises:
            ModelError: The vocabulary has one of them.
        """
        tokens = [token, *(f"{token}_{number}" for number in range(1, len(vectors)))]
        if known := [one for one in tokens if one in self.tokenizer.get_vocab()]:
            raise ModelError(
                f"the word {known[0]!r} is in the text encoder's vocabulary already; expected a "
                f"new one for the embedding: give it a token like '<{token}>'"
            )
        self.tokenizer.add_tokens(tokens)
        self.encoder.resize_token_embeddings(len(self.tokenizer), mean_resizing=False)
        table = self.encoder.get_input_embeddings().weight.requires_grad_(False)
        table[self.tokenizer.convert_tokens_to_ids(tokens)] = vectors.to(table)
        # older configurations give 2 here, and the pooled token is then the one of highest number
        getattr(self.encoder, "text_model", self.encoder).eos_token_id = self.tokenizer.eos_token_id

    def spelled(self, prompt: str) -> str:
        """A prompt with the further tokens of each word that was added, in capitals or not."""
        added, rows = self.tokenizer.added_tokens_encoder, dict[str, str]()
        for token in sorted(added, key=len, reverse=True):  # a longer word may begin with another
            row, number = [token], 1
            while (one := f"{token}_{number}") in added:
                row.append(one)
                number += 1
            rows[token.lower()] = " ".join(row)
        if not rows:
            return prompt
        words = "|".join(map(re.escape, rows))
        return re.sub(
            words, lambda found: rows.get(found[0].lower(), found[0]), prompt, flags=re.IGNORECASE
        )

    def warn_if_cut(self, prompt: str, length: int) -> None:
        """Warns of what does not fit into `length` tokens, those of begin and end included."""
        tokens = self.tokenizer(prompt, return_offsets_mapping=True, verbose=False)
        count = len(tokens["input_ids"])
        if count > length:
            begin, _ = tokens["offset_mapping"][length - 1]  # the last position is the end's
            warnings.warn(
                f"the text encoder takes at most {length - 2} tokens, got {count - 2}; the end is "
                f"cut off: {prompt[begin:]!r} of {prompt!r}",
                stacklevel=1,
            )
