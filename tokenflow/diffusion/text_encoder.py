"""What text encoders of all kinds have in common: one of transformers' networks, its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Int
from torch import Tensor

from tokenflow.diffusion.loading import ModelError


@dataclass(frozen=True)
class TextEncoder:
    """A text encoder and its tokenizer.

    Raises:
        ModelError: They are not of one model.
    """

    title: ClassVar[str] = "the tokenizer"
    """What errors call it."""
    encoder: Any
    tokenizer: Any

    def __post_init__(self) -> None:
        if 2 * len(self.tokenizer) < (words := self.encoder.config.vocab_size):
            raise ModelError(
                f"{self.title} knows {len(self.tokenizer)} tokens and the text encoder {words}: "
                f"prompts would be ignored; give the model its own, whole tokenizer"
            )

    def tokens(self, prompts: Sequence[str], length: int) -> Int[Tensor, "prompts length"]:
        """The prompts' tokens, padded or cut, on the encoder's device."""
        found = self.tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=length,
            return_tensors="pt",
        )
        ids: Tensor = found["input_ids"].to(self.encoder.device)
        return ids

    @property
    def vocabulary(self) -> tuple[Any, Any]:
        """All that tokens depend on, as JSON holds it."""
        tokens = json.loads(self.tokenizer.backend_tokenizer.to_str())
        for state in ("padding", "truncation"):  # as the last call left them
            del tokens[state]
        return tokens, self.tokenizer.special_tokens_map
