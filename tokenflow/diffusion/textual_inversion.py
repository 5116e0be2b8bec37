"""Textual inversion (Gal et al. 2022, arXiv 2208.01618): words whose embeddings were learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from safetensors.torch import load_file
from torch import Tensor

from tokenflow.diffusion.clip import CLIPText
from tokenflow.diffusion.loading import ModelError, weights_file
from tokenflow.diffusion.single_file import Checkpoint

FILE = "learned_embeds.safetensors"
"""What diffusers calls it in a folder."""
BOTH = ("clip_l", "clip_g")
"""The names of the vectors for SDXL's two text encoders."""
ALONE = "emb_params"
"""The name of the vectors in files that do not hold the word."""


@dataclass(frozen=True)
class Embedding:
    """One learned word.

    Args:
        model: A *.safetensors file, a folder with one, or the id of a hub model.
        token: What prompts call it; the word in the file, else the file's name, if not given.
    """

    model: str
    token: str | None = None


def add(embeddings: Sequence[Embedding], texts: Sequence[CLIPText], title: str) -> None:
    """Adds words to the vocabularies and tables of a model's text encoders.

    Raises:
        ModelError: A file is missing, is of another layout, or was made for another family; the
            word is one that the vocabulary has.
    """
    for embedding in embeddings:
        token, vectors = learned(embedding)
        widths, expected = [one.shape[-1] for one in vectors], [text.width for text in texts]
        if widths != expected:
            raise ModelError(
                f"the embedding {embedding.model} is not for this model: expected vectors of width "
                f"{expected} for its text encoders, got {widths}; choose one that was trained for "
                f"{title}"
            )
        for text, own in zip(texts, vectors, strict=True):
            text.add(token, own)


def learned(embedding: Embedding) -> tuple[str, list[Tensor]]:
    """The word of an embedding, and its vectors, (count, width), for each text encoder."""
    file = weights_file(embedding.model, "the embedding", FILE)
    Checkpoint.read(file)  # refuses what is no safetensors file
    weights: Mapping[str, Tensor] = load_file(file)
    if set(weights) == set(BOTH):
        word, found = file.stem, [weights[name] for name in BOTH]
    elif len(weights) == 1:
        ((name, one),) = weights.items()
        word, found = file.stem if name == ALONE else name, [one]
    else:
        raise ModelError(
            f"{file} is of another layout: expected the vectors of one word, or those of SDXL, "
            f"{' and '.join(BOTH)}, found {', '.join(sorted(weights)[:3]) or 'none'}; choose "
            f"another file"
        )
    return embedding.token or word, [one.reshape(-1, one.shape[-1]) for one in found]
