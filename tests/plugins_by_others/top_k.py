"""The k most similar tokens of both keyframes, as a mean with softmax weights."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokenflow.errors import InputError
from tokenflow.propagation import Correspondence, Propagation, Window


class TopK(Propagation):
    """Mixes the k most similar tokens: softer where features are coarse and steps are early.

    Args:
        k: Tokens of each keyframe, 1 or more; in the encoder the most similar one alone.
        temperature: Of the softmax over cosine similarities in the first step, above 0; it falls
            to a tenth in the last.
    """

    interface = 2

    def __init__(self, k: int = 4, temperature: float = 0.1) -> None:
        if k < 1 or temperature <= 0:
            raise InputError(f"expected k >= 1 and temperature > 0, got {k} and {temperature}")
        self.k, self.temperature = k, temperature

    def correspond(self, source: Tensor, keys: Tensor, window: Window) -> Correspondence:
        tokens = source.shape[1]
        k = min(self.k, tokens) if window.site.startswith("up_blocks") else 1
        temperature = self.temperature * (1 - 0.9 * window.step / window.steps)
        queries, keys = (normalize(x.float(), dim=-1) for x in (source, keys))
        indices, weights = [], []
        for query, both, blend in zip(queries, window.neighbours, window.blend, strict=True):
            # frame by frame, so that no matrix is larger than tokens × tokens
            found = [(query @ keys[int(n)].T).topk(k) for n in both]
            places = [f.indices + int(n) * tokens for f, n in zip(found, both, strict=True)]
            shares = [
                (f.values / temperature).softmax(-1) * float(b)
                for f, b in zip(found, blend, strict=True)
            ]
            indices.append(torch.cat(places, dim=-1))
            weights.append(torch.cat(shares, dim=-1))
        return Correspondence(torch.stack(indices), torch.stack(weights))
