"""Stopping where a run can be resumed: on SIGTERM and SIGUSR1, which schedulers send first."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread, current_thread, main_thread
from time import monotonic, sleep
from types import FrameType
from typing import Any

import torch.distributed as dist
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]  # not in its __all__

from tokenflow.errors import Preempted

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
PERIOD = 0.5
"""Seconds between two looks of a rank for the others' requests."""
POLL = 0.05
"""Seconds between two looks of a rank that waits for others."""
GRACE = 30.0
"""Seconds that a rank which stops waits for the others to stop, too."""


class Preemption:
    """A request to stop, which any rank of a job may receive and all of them follow.

    The signal's handler notes the request; sampling asks for it after every step. In a block of
    `interruptible`, where no collective runs, the handler raises `Preempted` at once. In a job of
    several ranks a thread passes requests on through a store that rank 0 holds: another rank's
    request arrives as if this process had received the signal itself. So does the end of rank 0.
    One run has one `Preemption`.
    """

    def __init__(self) -> None:
        self.requested = False
        self.depth = 0
        self.store: Store | None = None
        self.handlers: dict[int, Any] = {}
        self.over, self.thread = Event(), Thread(target=self.watch, daemon=True)

    def install(self) -> None:
        """Installs the handlers; not outside of the main thread, where Python allows none."""
        if current_thread() is main_thread():
            for number in SIGNALS:
                # the second time it is Lightning that has installed its own in between
                self.handlers.setdefault(number, signal.signal(number, self.handle))

    def restore(self) -> None:
        """Puts the handlers back that the first `install` has replaced."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def share(self) -> None:
        """Shares requests with the other ranks of torch.distributed's job, who all call this."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return
        host, first = os.environ["MASTER_ADDR"], dist.get_rank() == 0
        held = TCPStore(host, 0, is_master=True, wait_for_workers=False) if first else None
        port = [held.port if held else 0]
        dist.broadcast_object_list(port)
        self.store = held or TCPStore(host, port[0], is_master=False)
        self.thread.start()

    def close(self) -> None:
        """Ends sharing and restores the handlers.

        After a request it first waits for the other ranks: launchers end those that are left when
        one has ended, and some may still save.
        """
        self.over.set()
        if self.store is not None:
            self.thread.join()
            with suppress(RuntimeError):  # rank 0 has ended
                self.leave(self.store)
        self.store = None
        self.restore()

    def leave(self, store: Store) -> None:
        """Counts this rank as stopped; after a request, waits until all are.

        Rank 0, which holds the store, always waits: PyTorch would print of ranks that come late.
        """
        store.add("left", 1)
        if self.requested:
            store.set("stop", "")
        elif dist.get_rank() != 0:
            return
        end = monotonic() + (GRACE if self.requested else 2 * PERIOD)
        while store.add("left", 0) < dist.get_world_size() and monotonic() < end:
            sleep(POLL)
        if self.requested and dist.get_rank() == 0:
            sleep(2 * PERIOD)  # with the store, and with the exit code that counts, it ends last

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The signals' handler."""
        again, self.requested = self.requested, True
        if self.depth and not again:  # else the block is cleaning up
            raise Preempted

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """A block without collectives, which a request ends at once.

        Raises:
            Preempted: A rank was asked to stop.
        """
        self.depth += 1
        try:
            if self.requested:
                raise Preempted
            yield
        finally:
            self.depth -= 1

    def meet(self, name: str, ranks: int) -> None:
        """Waits until so many ranks have called this with one name, without a timeout.

        Raises:
            Preempted: A rank was asked to stop before all had come; on all ranks, or on none.
        """
        if self.store is None:
            return
        try:
            last, found = self.store.add(name, 1) == ranks, ""
            while not found:
                answer = "all" if last else "stop" if self.requested else ""
                # the first answer counts for all
                found = self.store.compare_set(f"{name}/answer", "", answer).decode()
                sleep(0 if found else POLL)
        except RuntimeError:  # rank 0 has ended
            found = "stop"
        if found == "stop":
            self.requested = True
            raise Preempted

    def watch(self) -> None:
        """Passes requests on, both ways, until the run is over."""
        assert self.store is not None, "share comes before"
        with suppress(RuntimeError):  # rank 0 has ended
            while not self.requested:
                if self.over.wait(PERIOD):
                    return
                if self.store.check(["stop"]):
                    break
            if self.requested:
                self.store.set("stop", "")
                return
        if self.handlers:
            signal.pthread_kill(main_thread().ident, SIGNALS[0])  # type: ignore[arg-type]
        else:
            self.requested = True
