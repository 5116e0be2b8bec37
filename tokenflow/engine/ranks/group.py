"""The ranks that share one clip: who has which frames, and what they tell each other.

Every rank has consecutive windows, in the order of ranks. Results do not depend on how many there
are: what leaves a rank is its keyframes' latents; or with full attention the keyframes' keys and
values, gathered in the frames' order, and the two keyframes at its ends, which the neighbouring
ranks' windows need.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from time import monotonic, sleep
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor

from tokenflow.engine.ranks.shard import Share
from tokenflow.errors import InputError, Preempted

T = TypeVar("T")
Keep = Callable[[Tensor], Any]
PATIENCE = timedelta(days=7)
"""How long ranks wait for each other between passes; one that ends is noticed at once."""
PULSE = 1.0
"""Seconds after which a rank that works alone asks the others whether it is to stop."""


class StopRequested(BaseException):
    """Ends a block of `FrameGroup.together` early, on a rank that was asked to stop.

    No `Exception`: who goes on whatever is wrong does not go on after it.
    """


class FrameGroup:
    """Ranks that share clips, by torch.distributed; alone, nothing is sent.

    Args:
        rank: This process's number in the group.
        size: Of the group.
        group: Through which its members tell each other keys, values and keyframes.
        device: Where these must be.
        control: Through which they tell each other everything else, from host memory.
        asked: Whether this process was asked to stop.

    Attributes:
        received: Bytes that have come to this rank from others, for keys, values and keyframes,
            or for latents.
        stopping: Whether some rank had been asked to stop when all were last together.
        shared: The failure that all ranks know of, if there is one.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        group: dist.ProcessGroup | None = None,
        device: torch.device | str = "cpu",
        control: dist.ProcessGroup | None = None,
        asked: Callable[[], bool] = lambda: False,
    ) -> None:
        self.rank, self.size, self.group, self.device = rank, size, group, device
        self.control, self.asked = control, asked
        self.received, self.stopping = 0, False
        self.shared: Exception | None = None

    @classmethod
    def join(
        cls,
        device: torch.device | str = "cpu",
        members: int | None = None,
        asked: Callable[[], bool] = lambda: False,
    ) -> FrameGroup:
        """This process's group of so many consecutive ranks; all of the job's when not given.

        All processes must call it together. `device` must be the current one.

        Raises:
            InputError: The job's ranks are no multiple of the members.
        """
        if not dist.is_initialized():
            if members not in (None, 1):
                raise InputError(
                    f"expected 1 rank for each clip of this one-rank run, got {members}"
                )
            return cls(asked=asked)
        rank, ranks = dist.get_rank(), dist.get_world_size()
        members = members or ranks
        if members < 1 or ranks % members:
            raise InputError(
                f"expected the number of ranks for each clip to divide {ranks}, the job's ranks; "
                f"got {members}"
            )
        mine = cls(rank % members, members, device=device, asked=asked)
        for first in range(0, ranks, members):
            those = list(range(first, first + members))
            group: Any = dist.new_group(those)
            control: Any = dist.new_group(those, backend="gloo", timeout=PATIENCE)
            if rank in those:
                mine.group, mine.control = group, control
        return mine

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that fails on all ranks if it fails on one.

        Nothing is to be sent in it but by `gather` and `with_neighbours`, by all or by none.
        Afterwards all know in `stopping` whether one of them was asked to stop. One may end the
        block early for that, by `StopRequested`; all then stop.

        Raises:
            InputError: Another rank failed; a rank that fails itself raises its own exception.
            Preempted: A rank ended the block early.
        """
        own: Exception | StopRequested | None = None
        try:
            yield
        except (Exception, StopRequested) as caught:
            # whatever it is, the others must not wait for this rank
            if caught is self.shared:  # from a block inside this one
                raise
            own = caught
        self.agree(own)

    def agree(self, own: Exception | StopRequested | None = None) -> None:
        """Tells the others what this rank failed with, if it did; raises if it or another has."""
        early = isinstance(own, StopRequested)
        failed = isinstance(own, Exception)
        somewhere, ended, self.stopping = self.anywhere(failed, early, early or self.asked())
        if somewhere:
            said = self.tell(f"{type(own).__name__}: {own}" if failed else None)
            if isinstance(own, Exception):
                self.shared = own
                raise own
            rank, words = next((r, words) for r, words in enumerate(said) if words is not None)
            self.shared = InputError(f"rank {rank} failed, and all stop with it: {words}")
            raise self.shared
        if ended:
            raise Preempted

    def knows(self, error: Exception) -> bool:
        """Whether all ranks have failed with this one, and can go on together with other work."""
        return self.size == 1 or error is self.shared

    def first_alone(self, work: Callable[[Callable[[], None]], None]) -> None:
        """Has rank 0 do the work for which the others wait; a request to any of them ends it.

        The work is given what it must call now and then, which may end it by `StopRequested`.
        """
        with self.together():
            if self.rank > 0:
                while self.tell(self.asked())[0] is not None:
                    pass
                return
            last = monotonic()

            def heed() -> None:
                nonlocal last
                self.heed()
                if monotonic() - last < PULSE:
                    return
                last = monotonic()
                try:
                    stop = any(self.tell(False))
                except RuntimeError as lost:  # another rank is gone: no failure of the work
                    raise StopRequested from lost  # and the next `tell` says so again
                if stop:
                    raise StopRequested

            try:
                work(heed)
            except (Exception, StopRequested):  # who is interrupted tells nobody
                self.tell(None)
                raise
            self.tell(None)

    def step(self) -> None:
        """Where all ranks are between two steps and none has anything to keep.

        Raises:
            InputError: Another rank failed.
            Preempted: One was asked to stop.
        """
        with self.together():
            pass
        self.leave()

    def heed(self) -> None:
        """Ends a block of `together` early, by `StopRequested`, where this rank was asked to."""
        if self.asked():
            raise StopRequested

    def leave(self) -> None:
        """Raises `Preempted` where a rank had been asked to stop when all were last together."""
        if self.stopping:
            raise Preempted

    def meet(self, own: T) -> list[T]:
        """As `tell`, but for ranks that may be waited for long: stops where it is asked to.

        Raises:
            Preempted: This rank was asked to stop.
            InputError: Another rank has ended.
        """
        try:
            arrival = dist.barrier(self.control, async_op=True)
            while not arrival.is_completed():
                if self.asked():
                    raise Preempted
                sleep(0.05)
            arrival.wait()
            return self.tell(own)
        except RuntimeError as error:
            sleep(2 * PULSE)  # the other's request to stop may be this rank's, too
            if self.asked():
                raise Preempted from error
            raise InputError(
                "another process has ended before all were done; start again, and they go on"
            ) from error

    def tell(self, own: T) -> list[T]:
        """What every rank says, in their order."""
        said: list[Any] = [own] * self.size
        if self.size > 1:
            dist.all_gather_object(said, own, group=self.control)
        return said

    def anywhere(self, *own: bool) -> list[bool]:
        """Which of these are true on some rank; several times as fast as `tell`."""
        marks = torch.tensor(own, dtype=torch.uint8)
        if self.size > 1:
            dist.all_reduce(marks, dist.ReduceOp.MAX, group=self.control)
        return [bool(mark) for mark in marks]

    def rounds(self, own: Sequence[T]) -> Iterator[T | None]:
        """Each of this rank's items; then none, as often as it takes the others to have theirs."""
        most = max(self.tell(len(own)))
        yield from own
        yield from [None] * (most - len(own))

    def mean(self, value: float, weight: int) -> float:
        """Of all ranks' values, by their weights."""
        parts = self.tell((value, weight))
        return sum(v * w for v, w in parts) / sum(w for _, w in parts)

    def to_first(
        self, own: Iterable[Shaped[Tensor, ...]], counts: Sequence[int], keep: Keep
    ) -> None:
        """Hands all ranks' items, one by one in their order, in host memory, to `keep` on rank 0.

        `own` are this rank's, all ranks' of one shape and type; of each rank's, as many are taken
        as `counts` says. Fails on all ranks if `keep` fails.
        """
        failure = None
        for item in self.arriving(itertools.islice(own, counts[self.rank]), counts):
            try:
                if failure is None:
                    keep(item)
            except Exception as caught:  # raised when no rank waits any more to be rid of its items
                failure = caught
        with self.together():
            if failure is not None:
                raise failure

    def arriving(self, own: Iterable[Tensor], counts: Sequence[int]) -> Iterator[Tensor]:
        """On rank 0, which has some itself, all ranks' items; elsewhere none, they are sent."""
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

    def from_first(self, own: Shaped[Tensor, "all ..."] | None) -> Shaped[Tensor, "all ..."] | None:
        """What rank 0 has, in host memory, on all ranks."""
        kind = self.tell(None if own is None else (own.shape, own.dtype))[0]
        if kind is None or self.size == 1:
            return own
        shape, dtype = kind
        every = own.cpu().contiguous() if own is not None else torch.empty(shape, dtype=dtype)
        dist.broadcast(every, group=self.control, group_src=0)
        return every

    def share(self, windows: Sequence[range]) -> Share:
        """This rank's part of a clip's windows."""
        return Share.of(windows, self.rank, self.size)

    def gather(
        self, own: Shaped[Tensor, "own ..."], counts: Sequence[int], host: bool = False
    ) -> Shaped[Tensor, "all ..."]:
        """The items of all ranks, in their order; `counts` says how many each has.

        `host` says that they are, and are to be, in host memory. An idle rank, whose count is 0,
        may pass any items of the right shape.
        """
        if self.size == 1:
            return own
        most = max(counts)
        padded = own.new_zeros(most, *own.shape[1:])
        padded[: counts[self.rank]] = own[: counts[self.rank]]
        parts = [torch.empty_like(padded) for _ in counts]
        self.agree()  # who has failed does not come, and is not waited for
        dist.all_gather(parts, padded, group=self.control if host else self.group)
        self.received += (self.size - 1) * padded.nbytes
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def with_neighbours(
        self, own: Shaped[Tensor, "own ..."], counts: Sequence[int]
    ) -> Shaped[Tensor, "some ..."]:
        """Own items, after the last of the rank before and before the first of the rank after.

        At a clip's ends there is none; an idle rank has no neighbours.
        """
        if self.size == 1:
            return own
        working = [rank for rank, count in enumerate(counts) if count]
        parts, exchanges = [own], []
        for other, end in ((self.rank - 1, own[:1]), (self.rank + 1, own[-1:])):
            if not {self.rank, other} <= set(working):
                continue
            arriving = torch.empty_like(end)
            exchanges += [
                dist.P2POp(dist.isend, end.contiguous(), group=self.group, group_peer=other),
                dist.P2POp(dist.irecv, arriving, group=self.group, group_peer=other),
            ]
            parts = [arriving, *parts] if other < self.rank else [*parts, arriving]
            self.received += arriving.nbytes
        self.agree()
        for request in dist.batch_isend_irecv(exchanges) if exchanges else ():
            request.wait()
        return torch.cat(parts)
