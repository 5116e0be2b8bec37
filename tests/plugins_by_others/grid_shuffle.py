"""RAVE (Kara et al. 2024, arXiv 2312.04524): frames in grids, shuffled anew at every step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor

from tokenflow.editors import Step
from tokenflow.engine import Consistency


class GridShuffle(Consistency):
    """Frames see each other as the parts of one picture, other ones at every step."""

    side: ClassVar[int] = 2
    """Frames along a grid's side."""

    def outputs(self, x: Tensor, step: Step) -> Iterator[tuple[Sequence[int], Tensor]]:
        s, side, frames = self.sampling, self.side, self.sampling.trajectory.positions
        own = s.inputs(x, frames, step).transpose(0, 1)
        every = s.ranks.all_gather(own, s.shard.frame_counts, host=True)
        result = torch.empty_like(every)  # frames, branches, c, h, w
        for grid in grids(len(every), side**2, s.settings.seed + step.index):
            if not {*grid} & {*frames}:
                continue  # another rank's
            tiled = rearrange(every[grid], "(p q) b c h w -> b 1 c (p h) (q w)", p=side)
            output = s.network.run(s.network.batch(tiled, grid[:1], step))
            cut = rearrange(output, "b 1 c (p h) (q w) -> (p q) b c h w", p=side, q=side)
            for frame, its in zip(grid, cut, strict=True):
                result[frame] = its
        yield frames, result[list(frames)].transpose(0, 1)


def grids(frames: int, size: int, seed: int) -> list[list[int]]:
    """All frames in a random order, `size` in each grid; the last is filled up from the first."""
    order = torch.randperm(frames, generator=torch.Generator().manual_seed(seed)).tolist()
    return [[order[i % frames] for i in range(a, a + size)] for a in range(0, frames, size)]
