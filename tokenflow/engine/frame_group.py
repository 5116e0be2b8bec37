"""The ranks that share one clip: who has which frames, and what they tell each other.

Every rank has consecutive windows, in the order of ranks. Results do not depend on how many there
are: what leaves a rank is keys and values of keyframes, gathered in the frames' order, and the two
keyframes at its ends, which the neighbouring ranks' windows need.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

from tokenflow.errors import InputError


@dataclass(frozen=True)
class Share:
    """What one rank has of a clip.

    Where a clip has fewer windows than there are ranks, an idle rank edits the first window along,
    alone, so that all call the same collectives; its result is nobody's.

    Attributes:
        windows: Of the whole clip.
        own: Which of them are this rank's, by number.
        counts: How many windows each rank contributes, an idle one 0.
        idle: Whether this rank is one.
    """

    windows: Sequence[range]
    own: range
    counts: tuple[int, ...]
    idle: bool = False

    @property
    def held(self) -> range:
        """The windows whose keyframes this rank sees: its own, and one more at each side."""
        if self.idle:
            return self.own
        return range(max(self.own.start - 1, 0), min(self.own.stop + 1, len(self.windows)))

    @property
    def frame_counts(self) -> tuple[int, ...]:
        """How many frames each rank contributes."""
        ends = itertools.pairwise([0, *itertools.accumulate(self.counts)])
        return tuple(sum(map(len, self.windows[a:b])) for a, b in ends)

    def positions(self, numbers: range) -> range:
        """The frames of consecutive windows."""
        return range(self.windows[numbers[0]].start, self.windows[numbers[-1]].stop)


class FrameGroup:
    """Ranks that share clips, by torch.distributed; alone, nothing is sent.

    Args:
        rank: This process's number in the group.
        size: Of the group.
        group: Through which its members talk.
        device: Where what they tell each other must be.

    Attributes:
        received: Bytes that have come to this rank from others, for keys, values and keyframes.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        group: dist.ProcessGroup | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.rank, self.size, self.group, self.device = rank, size, group, device
        self.received = 0

    @classmethod
    def of_all_ranks(cls, device: torch.device | str = "cpu") -> FrameGroup:
        """All processes of the job, which may be one; `device` must be the current one."""
        if not dist.is_initialized():
            return cls()
        return cls(dist.get_rank(), dist.get_world_size(), dist.group.WORLD, device)

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that fails on all ranks if it fails on one; nothing is to be sent in it.

        Raises:
            InputError: Another rank failed; a rank that fails itself raises its own exception.
        """
        own: Exception | None = None
        try:
            yield
        except Exception as caught:  # whatever it is, the others must not wait for this rank
            own = caught
        said: list[str | None] = [None] * self.size
        if self.size > 1:
            what = None if own is None else f"{type(own).__name__}: {own}"
            dist.all_gather_object(said, what, group=self.group)
        if own is not None:
            raise own
        for rank, what in enumerate(said):
            if what is not None:
                raise InputError(f"rank {rank} failed, and all stop with it: {what}")

    def mean(self, value: float, weight: int) -> float:
        """Of all ranks' values, by their weights."""
        if self.size == 1:
            return value
        parts: list[tuple[float, int]] = [(0.0, 0)] * self.size
        dist.all_gather_object(parts, (value, weight), group=self.group)
        return sum(v * w for v, w in parts) / sum(w for _, w in parts)

    def to_first(
        self, own: Float[Tensor, "own 3 height width"], counts: Sequence[int]
    ) -> UInt8[Tensor, "all 3 height width"] | None:
        """All ranks' frames in their order, as bytes in host memory: on rank 0, elsewhere none."""
        levels = (own.clamp(0, 1) * 255).round().byte()
        if self.rank != 0:
            for frame in levels[: counts[self.rank]]:
                dist.send(frame[None].to(self.device), group=self.group, group_dst=0)
            return None
        arrived = [levels.cpu()]
        for rank, count in enumerate(counts[1:], start=1):
            for _ in range(count):
                frame = torch.empty_like(levels[:1], device=self.device)
                dist.recv(frame, group=self.group, group_src=rank)
                arrived.append(frame.cpu())
        return torch.cat(arrived)

    def share(self, windows: Sequence[range]) -> Share:
        """This rank's part of a clip's windows: each rank has as many, the first ones one more."""
        each, more = divmod(len(windows), self.size)
        counts = tuple(each + (rank < more) for rank in range(self.size))
        first = sum(counts[: self.rank])
        own = range(first, first + counts[self.rank])
        return Share(windows, own or range(1), counts, idle=not own)

    def gather(
        self, own: Shaped[Tensor, "own ..."], counts: Sequence[int]
    ) -> Shaped[Tensor, "all ..."]:
        """The items of all ranks, in their order; `counts` says how many each has.

        An idle rank, whose count is 0, may pass any items of the right shape.
        """
        if self.size == 1:
            return own
        most = max(counts)
        padded = own.new_zeros(most, *own.shape[1:])
        padded[: counts[self.rank]] = own[: counts[self.rank]]
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded, group=self.group)
        self.received += (self.size - 1) * padded.nbytes
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def with_neighbours(
        self, own: Shaped[Tensor, "own ..."], counts: Sequence[int]
    ) -> Shaped[Tensor, "some ..."]:
        """Own items, after the last of the rank before and before the first of the rank after.

        At a clip's ends there is none; an idle rank has no neighbours.
        """
        working = [rank for rank, count in enumerate(counts) if count]
        if self.rank not in working or len(working) == 1:
            return own
        before, after = (r if r in working else None for r in (self.rank - 1, self.rank + 1))
        parts, exchanges = [own], []
        for other, end in ((before, own[:1]), (after, own[-1:])):
            if other is None:
                continue
            arriving = torch.empty_like(end)
            exchanges += [
                dist.P2POp(dist.isend, end.contiguous(), group=self.group, group_peer=other),
                dist.P2POp(dist.irecv, arriving, group=self.group, group_peer=other),
            ]
            parts = [arriving, *parts] if other == before else [*parts, arriving]
            self.received += arriving.nbytes
        for request in dist.batch_isend_irecv(exchanges):
            request.wait()
        return torch.cat(parts)
