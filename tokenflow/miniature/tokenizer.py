"""A CLIP tokenizer whose vocabulary is the scene grammar's words."""

from __future__ import annotations

import json
import string
from itertools import pairwise
from pathlib import Path

from transformers import CLIPTokenizer

from tokenflow.miniature.scenes import VOCABULARY

END = "</w>"
MAX_LENGTH = 16


def save_tokenizer(folder: Path) -> CLIPTokenizer:
    """Builds the tokenizer in `folder` and loads it: one token for each word of the grammar.

    Each word's merges come after those of the words before it, and so never split one of these;
    words outside the grammar fall into pieces.
    """
    words = ["a", "on", *(word for group in VOCABULARY.values() for word in group)]
    tokens = [*string.ascii_lowercase, *(letter + END for letter in string.ascii_lowercase)]
    merges: list[tuple[str, str]] = []
    for word in words:
        while len(pieces := byte_pairs(word, merges)) > 1:
            merges.append((pieces[0], pieces[1]))
            tokens.append(pieces[0] + pieces[1])
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").unlink(missing_ok=True)  # it would be read in place of the two
    vocabulary = folder / "vocab.json"
    vocabulary.write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n")
    CLIPTokenizer.from_pretrained(folder, model_max_length=MAX_LENGTH).save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def byte_pairs(word: str, merges: list[tuple[str, str]]) -> list[str]:
    """The pieces of `word` after byte-pair encoding: the earliest merge first, until none fits."""
    pieces = [*word[:-1], word[-1] + END]
    rank = {pair: i for i, pair in enumerate(merges)}
    while ranked := [i for i, pair in enumerate(pairwise(pieces)) if pair in rank]:
        i = min(ranked, key=lambda i: rank[pieces[i], pieces[i + 1]])
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    return pieces
