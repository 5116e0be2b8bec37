"""Correspondence by optical flow where it can be trusted, by features where it cannot."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from tokenflow.errors import InputError
from tokenflow.propagation.base import Correspondence, Propagation, Window
from tokenflow.propagation.flow.base import OpticalFlow, inside, targets
from tokenflow.propagation.flow.dis import DIS
from tokenflow.propagation.nn_field import nearest


class FlowWeighted(Propagation):
    """Each token is followed by optical flow, and by its features where flow fails.

    In a neighbouring keyframe a token has five taps: four around the place where flow takes it,
    with weight w, and its nearest neighbour by features, with weight 1 - w, where

        w = [inside the frame] · exp(-(e / inconsistency)⁴ - (g / disagreement)⁴).

    e is the flow's forward-backward inconsistency; g is what the features lose by following the
    flow: 0 as similar as the nearest neighbour, 1 as the mean token. (docs/method.md)

    Args:
        flow: What finds optical flow; `DIS` when not given.
        inconsistency: Where w has fallen to 1/e, in latent pixels of the site; above 0.
        disagreement: Where w has fallen to 1/e, a share of similarity; above 0.
        block: Tokens matched at once.
    """

    identity_at_keyframes = True

    def __init__(
        self,
        flow: OpticalFlow | None = None,
        inconsistency: float = 0.5,
        disagreement: float = 0.35,
        block: int = 2048,
    ) -> None:
        for name, value in (("inconsistency", inconsistency), ("disagreement", disagreement)):
            if not value > 0:
                raise InputError(f"{name} must be above 0, got {value}")
        if block < 1:
            raise InputError(f"block must be at least 1 token, got {block}")
        self.flow = flow or DIS()
        self.inconsistency, self.disagreement, self.block = inconsistency, disagreement, block

    def correspond(
        self,
        source: Float[Tensor, "frames tokens channels"],
        keys: Float[Tensor, "keyframes tokens channels"],
        window: Window,
    ) -> Correspondence:
        if window.motion is None:
            raise InputError("FlowWeighted needs a window with motion, got one without")
        frames, tokens, _ = source.shape
        indices = torch.zeros(frames, tokens, 2, 5, dtype=torch.long, device=source.device)
        weights = torch.zeros(frames, tokens, 2, 5, device=source.device)
        at, blend = torch.tensor(window.frames), window.blend.cpu()
        for k, key in enumerate(keys):
            # a neighbour of no weight is not searched
            asking = (window.neighbours.cpu() == k) & (blend > 0)
            frame, side = asking.nonzero(as_tuple=True)
            if len(frame) == 0:
                continue
            queries = source[frame]
            displacement, inconsistency = (
                x[frame, side].to(source.device)
                for x in (window.motion.displacement, window.motion.inconsistency)
            )
            place, share, inside = bilinear(displacement, window.height, window.width)
            match = nearest(queries.flatten(0, 1), key, self.block).view(-1, tokens)
            lost = disagreement(queries, key, place, share, match)
            trust = inside * self.trust(inconsistency, lost)
            # a keyframe's tokens are where they are, however alike two of them look
            trust[at[frame] == window.keyframes[k]] = 1
            taps = torch.cat([share * trust[..., None], 1 - trust[..., None]], dim=-1)
            indices[frame, :, side] = torch.cat([place, match[..., None]], dim=-1) + k * tokens
            weights[frame, :, side] = taps * blend[frame, side].to(taps)[:, None, None]
        return Correspondence(indices.flatten(2), weights.flatten(2))

    def trust(
        self, inconsistency: Float[Tensor, "n tokens"], lost: Float[Tensor, "n tokens"]
    ) -> Float[Tensor, "n tokens"]:
        """The weight of flow, 0 to 1: near 1 below both scales, near 0 beyond either."""
        e, g = inconsistency / self.inconsistency, lost / self.disagreement
        return torch.exp(-(e**4) - g**4)


def bilinear(
    displacement: Float[Tensor, "n tokens 2"], height: int, width: int
) -> tuple[Int[Tensor, "n tokens 4"], Float[Tensor, "n tokens 4"], Float[Tensor, "n tokens"]]:
    """The four tokens around each displaced one, their shares, and 1 where that is in the frame."""
    flow = displacement.unflatten(1, (height, width)).movedim(-1, 1)
    there = targets(flow).flatten(2).mT
    limit = torch.tensor([width, height], device=there.device) - 1
    there = there.clamp(min=torch.zeros_like(limit), max=limit)
    near = there.floor()
    share = there - near
    (left, top), (right, bottom) = (
        corner.long().unbind(-1) for corner in (near, (near + 1).clamp(max=limit))
    )
    fx, fy = share.unbind(-1)
    places = [row * width + column for row in (top, bottom) for column in (left, right)]
    shares = [b * a for b in (1 - fy, fy) for a in (1 - fx, fx)]
    return torch.stack(places, dim=-1), torch.stack(shares, dim=-1), inside(flow).flatten(1)


def disagreement(
    queries: Float[Tensor, "n tokens channels"],
    key: Float[Tensor, "tokens channels"],
    place: Int[Tensor, "n tokens 4"],
    share: Float[Tensor, "n tokens 4"],
    match: Int[Tensor, "n tokens"],
) -> Float[Tensor, "n tokens"]:
    """What of a match's similarity, above the mean token's, is lost at a flow's place."""
    queries, unit = queries.float(), normalize(key.float(), dim=-1)
    flowed = torch.zeros_like(queries)
    for index, weight in zip(place.unbind(-1), share.unbind(-1), strict=True):
        flowed += unit[index] * weight[..., None]
    best, here = (cosine_similarity(queries, other, dim=-1) for other in (unit[match], flowed))
    mean = normalize(queries, dim=-1) @ unit.mean(dim=0)
    # where all tokens look the same there is nothing to lose
    return ((best - here) / (best - mean).clamp(min=1e-4)).clamp(min=0)
