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
        neighbours = window.neighbours.cpu()  # an accelerator would be waited for
        for k in range(len(keys)):
            frame, side = (neighbours == k).nonzero(as_tuple=True)
            asking, place = frame.unique(return_inverse=True)
            if len(asking) == 0:
                continue
            found = nearest(source[asking].flatten(0, 1), keys[k], self.block) + k * tokens
            indices[frame, :, side] = found.view(-1, tokens)[place]
        weights = window.blend.to(source.device, torch.float32)[:, None].expand(-1, tokens, -1)
        return Correspondence(indices, weights)


def nearest(
    queries: Float[Tensor, "queries channels"], keys: Float[Tensor, "keys channels"], block: int
) -> Int[Tensor, " queries"]:
    """The most similar key of each query: full search in blocks, cosine similarity in float32.

    Queries need no normalisation, since a row's scale does not move its maximum.
    """
    unit = functional.normalize(keys.float(), dim=-1).T
    # max, not argmax: argmax over long rows is an order of magnitude slower on CPUs
    return torch.cat([(part.float() @ unit).max(dim=1).indices for part in queries.split(block)])
