"""The paper's kernel: each token's nearest neighbour in each neighbouring keyframe."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from tokenflow.errors import InputError
from tokenflow.propagation.base import Correspondence, Propagation, Window


class NNField(Propagation):
    """Nearest neighbours by cosine similarity (equation 5), blended over time (equation 6).

    Args:
        block: Tokens matched at once; similarities of one block against all tokens of one
            keyframe are all that is ever held.
    """

    identity_at_keyframes = True

    def __init__(self, block: int = 2048) -> None:
        if block < 1:
            raise InputError(f"block must be at least 1 token, got {block}")
        self.block = block

    def correspond(
        self,
        source: Float[Tensor, "frames tokens channels"],
        keys: Float[Tensor, "keyframes tokens channels"],
        window: Window,
    ) -> Correspondence:
        frames, tokens, _ = source.shape
        indices = torch.empty(frames, tokens, 2, dtype=torch.long, device=source.device)
        neighbours = window.neighbours.tolist()  # numbers: with tensors an accelerator may wait
        for k, key in enumerate(keys):
            asking = [frame for frame, pair in enumerate(neighbours) if k in pair]
            if not asking:
                continue
            queries = torch.cat([source[frame] for frame in asking])
            found = nearest(queries, key, self.block) + k * tokens
            for frame, match in zip(asking, found.split(tokens), strict=True):
                for side in (0, 1):
                    if neighbours[frame][side] == k:
                        indices[frame, :, side] = match
        blend = window.blend.to(source.device, torch.float32, non_blocking=True)
        weights = blend[:, None].expand(-1, tokens, -1)
        return Correspondence(indices, weights)


def nearest(
    queries: Float[Tensor, "queries channels"], keys: Float[Tensor, "keys channels"], block: int
) -> Int[Tensor, " queries"]:
    """The most similar key of each query: full search in blocks, cosine similarity in float32.

    Queries need no normalisation, since a row's scale does not move its maximum.
    """
    unit = functional.normalize(keys.float(), dim=-1).T
    return torch.cat([best(part.float() @ unit) for part in queries.split(block)])


def best(similarity: Float[Tensor, "queries keys"]) -> Int[Tensor, " queries"]:
    """The largest value's place in each row."""
    if similarity.device.type == "cpu":
        # NumPy's runs at the rate of memory here, PyTorch's takes longer than the matrix product
        return torch.from_numpy(similarity.numpy().argmax(axis=1))
    return similarity.max(dim=1).indices
