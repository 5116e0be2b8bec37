"""Stopping where a run can go on: on SIGTERM and SIGUSR1, by which schedulers announce its end."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread
from time import sleep
from types import FrameType
from typing import Any, ClassVar

import torch.distributed as dist

# the store has no public name, and every launcher makes another one
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store

from tokenflow.errors import InputError, Preempted

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
PERIOD = 0.5
"""Seconds between two looks into the job's store."""
STOP = "stop"


class Preemption:
    """A request to stop, which any rank of a job may receive and all of them follow.

    The signal's handler notes the request; sampling asks for it after every step. Where no
    collective runs, in a block of `interruptible`, the handler raises `Preempted` at once. In a
    job of several ranks a thread passes requests on through the job's store: another rank's
    arrives as if this process had received the signal itself.
    """

    jobs: ClassVar[Iterator[int]] = itertools.count()

    def __init__(self) -> None:
        self.requested = self.lost = False
        self.store: Store | None = None
        self.depth = 0
        self.before: dict[int, Any] = {}
        self.over, self.thread = Event(), Thread(target=self.watch, daemon=True)

    def start(self) -> None:
        """Sets the handlers, in the main thread; again if somebody else has set theirs."""
        for number in SIGNALS:
            before = signal.signal(number, self.handle)
            if before != self.handle:
                self.before.setdefault(number, before)

    def join(self) -> None:
        """Shares requests with the other ranks of torch.distributed's job."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            job = f"tokenflow/{next(self.jobs)}"  # a request of the run before is not this one's
            self.store = PrefixStore(job, _get_default_store())
            self.thread.start()

    def close(self) -> None:
        """Puts the handlers of before back, after all ranks know of a request."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}
        if self.store is None or self.over.is_set():
            return
        self.over.set()
        self.thread.join()
        if self.requested:
            with suppress(RuntimeError):
                self.store.set(STOP, "")
            if dist.get_rank() == 0:
                sleep(2 * PERIOD)  # the others read it; the store may end with this process

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The signals' handler."""
        if self.lost:
            raise InputError("rank 0 has ended, and this rank ends with it; start again")
        self.requested = True
        if self.depth:
            raise Preempted

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """A block without collectives, which a request ends at once.

        Raises:
            Preempted: A rank was asked to stop.
        """
        self.check()
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1

    def check(self) -> None:
        """Raises `Preempted` where a rank was asked to stop."""
        if self.requested:
            raise Preempted

    def watch(self) -> None:
        """Passes requests on, both ways, until the job is over."""
        assert self.store is not None, "join comes before"
        store, passed = self.store.clone(), False
        try:
            while not passed and not self.over.wait(PERIOD):
                if self.requested:
                    store.set(STOP, "")
                    passed = True
                elif store.check([STOP]):
                    passed = True
                    signal.raise_signal(SIGNALS[0])
        except RuntimeError:  # the store has ended, and rank 0 with it; unless all are done
            if not self.over.wait(10 * PERIOD):
                self.lost = True
                signal.raise_signal(SIGNALS[0])
