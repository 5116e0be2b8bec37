"""The ranks that share one clip, and their collectives.

Every rank has consecutive windows, in the order of ranks. Results do not depend on how many ranks
there are: keyframes' latents, or their keys and values, are all-gathered in the frames' order, and
a halo of one keyframe at each side is exchanged between neighbours.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from time import sleep
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor

from tokenflow.engine.ranks.preemption import Preemption
from tokenflow.engine.ranks.shard import WindowShard
from tokenflow.errors import InputError, Preempted

T = TypeVar("T")


class FrameGroup:
    """Ranks that share clips, by torch.distributed; a rank alone exchanges nothing.

    Args:
        rank: This process's number in the group.
        size: Of the group.
        group: For keys, values and keyframes.
        control: For everything else, in host memory.
        preemption: Of the job.

    Attributes:
        received: Bytes of keys, values, keyframes and latents that other ranks have sent.
        shared: The failure that all ranks know of, if there is one.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        group: dist.ProcessGroup | None = None,
        control: dist.ProcessGroup | None = None,
        preemption: Preemption | None = None,
    ) -> None:
        self.rank, self.size, self.group = rank, size, group
        self.control, self.preemption = control, preemption or Preemption()
        self.received, self.meetings = 0, 0
        self.shared: Exception | None = None

    @classmethod
    def join(cls, members: int | None = None, preemption: Preemption | None = None) -> FrameGroup:
        """This process's group of so many consecutive ranks; all of the job's when not given.

        All processes must call it together.

        Raises:
            InputError: The job's ranks are no multiple of the members.
        """
        require_divisor(members)
        if not dist.is_initialized():
            return cls(preemption=preemption)
        rank, ranks = dist.get_rank(), dist.get_world_size()
        members = members or ranks
        mine = cls(rank % members, members, preemption=preemption)
        for begin in range(0, ranks, members):
            those = list(range(begin, begin + members))
            group: Any = dist.new_group(those)
            control: Any = dist.new_group(those, backend="gloo")
            if rank in those:
                mine.group, mine.control = group, control
        return mine

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block without collectives that fails on all ranks if it fails on one.

        Raises:
            InputError: Another rank failed; a rank that fails itself raises its own exception.
            Preempted: A rank raised it in the block.
        """
        own: Exception | Preempted | None = None
        try:
            yield
        except (Exception, Preempted) as caught:
            own = caught
        failed, preempted = self.any(isinstance(own, Exception), isinstance(own, Preempted))
        if failed:
            said = self.all_gather_object(
                f"{type(own).__name__}: {own}" if isinstance(own, Exception) else None
            )
            if isinstance(own, Exception):
                self.shared = own
                raise own
            rank, words = next((r, words) for r, words in enumerate(said) if words is not None)
            self.shared = InputError(f"rank {rank} failed, and all stop with it: {words}")
            raise self.shared
        if preempted:
            self.preemption.requested = True
            raise Preempted

    def knows(self, error: Exception) -> bool:
        """Whether all ranks have failed with this error, and can continue with the next clip."""
        return self.size == 1 or error is self.shared

    def meet(self) -> None:
        """Waits for all ranks, without a timeout.

        Raises:
            Preempted: A rank was asked to stop before all had come; on all ranks, or on none.
        """
        self.meetings += 1
        if self.control is not None:
            name = f"{self.control.group_name}/{self.meetings}"
            self.preemption.meet(name, self.size)

    def all_gather_object(self, own: T) -> list[T]:
        """What every rank has, in their order."""
        every: list[Any] = [own] * self.size
        if self.size > 1:
            dist.all_gather_object(every, own, group=self.control)
        return every

    def any(self, *own: bool) -> list[bool]:
        """Which of these are true on some rank; several times as fast as `all_gather_object`."""
        marks = torch.tensor(own, dtype=torch.uint8)
        if self.size > 1:
            work: Any = dist.all_reduce(marks, dist.ReduceOp.MAX, self.control, async_op=True)
            while not work.is_completed():  # a signal's handler runs only between Python's steps
                sleep(0.001)
            work.wait()
        return [bool(mark) for mark in marks]

    def mean(self, value: float, weight: int) -> float:
        """Of all ranks' values, by their weights."""
        parts = self.all_gather_object((value, weight))
        return sum(v * w for v, w in parts) / sum(w for _, w in parts)

    def gather(
        self,
        own: Iterable[Shaped[Tensor, ...]],
        counts: Sequence[int],
        keep: Callable[[Tensor], Any],
    ) -> None:
        """Calls `keep` on rank 0 with all ranks' items, one by one in their order.

        One item at a time is in memory. `own` are this rank's, all ranks' of one shape and type;
        of each rank's, as many are taken as `counts` says. Fails on all ranks if `keep` fails.
        """
        failure = None
        for item in self._arriving(itertools.islice(own, counts[self.rank]), counts):
            try:
                if failure is None:
                    keep(item)
            except Exception as caught:  # raised when the other ranks have sent their items
                failure = caught
        with self.together():
            if failure is not None:
                raise failure

    def _arriving(self, own: Iterable[Tensor], counts: Sequence[int]) -> Iterator[Tensor]:
        item = torch.empty(0)
        for item in own:
            item = item.cpu().contiguous()
            if self.rank == 0:
                yield item
            else:
                dist.send(item, group=self.control, group_dst=0)
        for other, count in enumerate(counts):
            for _ in range(count if self.rank == 0 < other else 0):
                item = torch.empty_like(item)
                dist.recv(item, group=self.control, group_src=other)
                yield item

    def broadcast(self, own: Shaped[Tensor, "all ..."] | None) -> Shaped[Tensor, "all ..."] | None:
        """What rank 0 has, in host memory, on all ranks."""
        kind = self.all_gather_object(None if own is None else (own.shape, own.dtype))[0]
        if kind is None or self.size == 1:
            return own
        shape, dtype = kind
        every = own.cpu().contiguous() if own is not None else torch.empty(shape, dtype=dtype)
        dist.broadcast(every, group=self.control, group_src=0)
        return every

    def shard(self, windows: Sequence[range]) -> WindowShard:
        """This rank's part of a clip's windows."""
        return WindowShard.of(windows, self.rank, self.size)

    def all_gather(
        self, own: Shaped[Tensor, "own ..."], counts: Sequence[int], host: bool = False
    ) -> Shaped[Tensor, "all ..."]:
        """The items of all ranks, in their order; `counts` says how many each has.

        `host` says that they are, and are to be, in host memory. A rank whose count is 0 may pass
        any items of the right shape.
        """
        if self.size == 1:
            return own
        most = max(counts)
        padded = own.new_zeros(most, *own.shape[1:])
        padded[: counts[self.rank]] = own[: counts[self.rank]]
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded, group=self.control if host else self.group)
        self.received += (self.size - 1) * padded.nbytes
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def exchange_halo(
        self, own: Shaped[Tensor, "own ..."], counts: Sequence[int], host: bool = False
    ) -> Shaped[Tensor, "some ..."]:
        """Own items, after the last of the rank before and before the first of the rank after.

        At a clip's ends there is none; a rank whose count is 0 has no neighbours. `host` is as for
        `all_gather`.
        """
        if self.size == 1:
            return own
        group = self.control if host else self.group
        working = [rank for rank, count in enumerate(counts) if count]
        parts, exchanges = [own], []
        for other, end in ((self.rank - 1, own[:1]), (self.rank + 1, own[-1:])):
            if not {self.rank, other} <= set(working):
                continue
            arriving = torch.empty_like(end, memory_format=torch.contiguous_format)
            exchanges += [
                dist.P2POp(dist.isend, end.contiguous(), group=group, group_peer=other),
                dist.P2POp(dist.irecv, arriving, group=group, group_peer=other),
            ]
            parts = [arriving, *parts] if other < self.rank else [*parts, arriving]
            self.received += arriving.nbytes
        for request in dist.batch_isend_irecv(exchanges) if exchanges else ():
            request.wait()
        return torch.cat(parts)


def require_divisor(members: int | None) -> None:
    """Raises `InputError` for a number of ranks per clip that does not divide the job's ranks."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    if members is not None and (members < 1 or ranks % members):
        raise InputError(
            f"expected the number of ranks for each clip to divide {ranks}, the job's ranks; "
            f"got {members}"
        )
