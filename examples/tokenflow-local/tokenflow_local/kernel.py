"""Nearest neighbours by features, looked for near by: what moves little is not confused."""

from itertools import product
from math import hypot

import torch
from torch.nn.functional import normalize

from tokenflow.errors import InputError
from tokenflow.propagation import Correspondence, Propagation


class LocalField(Propagation):
    """The most similar token at most `radius` away; of equally similar ones, the nearest.

    Args:
        radius: How far a token may have moved to a keyframe, as a share of the frame's width,
            above 0 to 1.
    """

    interface = 2
    identity_at_keyframes = True

    def __init__(self, radius: float = 0.125) -> None:
        if not 0 < radius <= 1:
            raise InputError(f"radius is a share of the width, above 0 to 1, got {radius}")
        self.radius = radius

    def correspond(self, source, keys, window) -> Correspondence:
        height, width, device = window.height, window.width, source.device
        neighbours = window.neighbours.to(device)
        queries = source.float().unflatten(1, (height, width))[:, None]
        unit = normalize(keys.float(), dim=-1).unflatten(1, (height, width))[neighbours]
        own = torch.arange(height * width, device=device).view(height, width)
        best = (queries * unit).sum(-1)  # (frames, 2, height, width), of the token's own place
        place = own.expand_as(best)
        reach = max(1, round(self.radius * width))
        steps = product(range(-reach, reach + 1), repeat=2)
        for down, right in sorted(steps, key=lambda step: hypot(*step)):
            rows = (torch.arange(height, device=device) + down).clamp(0, height - 1)
            columns = (torch.arange(width, device=device) + right).clamp(0, width - 1)
            there = (queries * unit[:, :, rows][:, :, :, columns]).sum(-1)
            place = torch.where(there > best, own[rows][:, columns], place)
            best = torch.maximum(there, best)
        indices = place.flatten(2) + neighbours[..., None] * height * width
        weights = window.blend.to(device)[:, None].expand(-1, height * width, -1)
        return Correspondence(indices.transpose(1, 2), weights)
