"""Ranks that share the tiny clip, as threads of this process: nothing to start, nothing to send."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, BrokenBarrierError, Lock
from typing import Any, TypeVar

import torch
from jaxtyping import Shaped
from torch import Tensor

from tokenflow.engine.ranks.group import FrameGroup
from tokenflow.testing.checks import require

T = TypeVar("T")
DONE = object()


class Meeting:
    """Where so many threads show each other what they have; between, one runs at a time.

    So none sees the random state, or what else is the process's own, as another has set it.
    """

    def __init__(self, size: int) -> None:
        self.barrier, self.turn = Barrier(size), Lock()
        self.shown: list[Any] = [None] * size

    def show(self, rank: int, own: T) -> list[T]:
        """What every thread shows, in the order of ranks; the last is `DONE`."""
        self.shown[rank] = own
        self.turn.release()
        try:
            self.barrier.wait()
            every = list(self.shown)
            self.barrier.wait()
        finally:
            self.turn.acquire()
        require(
            len({one is DONE for one in every}) == 1, "all ranks to take as many steps",
            "one that ends before another",
            "choose timesteps by the schedule and the options alone, not by the rank's frames",
        )  # fmt: skip
        return every


class Threads(FrameGroup):
    """A frame group whose ranks meet in one process, for what an edit of latents sends."""

    def __init__(self, rank: int, size: int, meeting: Meeting) -> None:
        super().__init__(rank, size)
        self.meeting = meeting

    def all_gather_object(self, own: T) -> list[T]:
        return self.meeting.show(self.rank, own)

    def any(self, *own: bool) -> list[bool]:
        return list(map(any, zip(*self.all_gather_object(own), strict=True)))

    def all_gather(
        self, own: Shaped[Tensor, "own ..."], counts: Sequence[int], host: bool = False
    ) -> Shaped[Tensor, "all ..."]:
        every = zip(self.meeting.show(self.rank, own), counts, strict=True)
        return torch.cat([part[:count] for part, count in every])

    def exchange_halo(
        self, own: Shaped[Tensor, "own ..."], counts: Sequence[int], host: bool = False
    ) -> Shaped[Tensor, "some ..."]:
        every = self.meeting.show(self.rank, own)
        before = every[self.rank - 1][-1:] if self.rank > 0 else own[:0]
        after = every[self.rank + 1][:1] if self.rank < self.size - 1 else own[:0]
        return torch.cat([before, own, after])


def on_ranks(size: int, function: Callable[[FrameGroup], T]) -> list[T]:
    """What a function returns on each of `size` ranks; raises what it raises on one."""
    meeting = Meeting(size)

    def run(rank: int) -> T:
        try:
            with meeting.turn, torch.no_grad():
                result = function(Threads(rank, size, meeting))
                meeting.show(rank, DONE)
                return result
        except BaseException:
            meeting.barrier.abort()  # the others must not wait for this one
            raise

    with ThreadPoolExecutor(size) as threads:
        every = [threads.submit(run, rank) for rank in range(size)]
    errors = [error for one in every if (error := one.exception()) is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, BrokenBarrierError)):
        raise error
    return [one.result() for one in every]
