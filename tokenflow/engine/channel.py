"""What the processes of a job tell each other, for which none of them waits."""

from __future__ import annotations

import faulthandler
import itertools
import os
import sys
from collections.abc import Callable
from threading import Event, Thread
from typing import ClassVar

from torch.distributed import get_rank, get_world_size
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store

BEAT = 1.0
"""Seconds between a process's signs of life."""
LOST = 30
"""Beats without one after which a process counts as lost; a busy one may be late.

Beats are counted, and no seconds, as a suspended job gets no older.
"""
HOPELESS = 20
"""Beats after which a process ends that shares a clip with a lost one, if it waits for that one."""
DONE, STOP = "done", "stop"


class Channel:
    """A request to stop reaches all processes of a job, and so does the loss of one.

    Every process gives signs of life to the job's store, and looks there for those of the next one
    and for requests; in a thread of its own, until the channel is closed. When one is lost all
    stop where they can go on; and who shares a clip with it, and so cannot, just ends, with what
    it was waiting in.

    Args:
        store: Where all processes meet; the first one holds it.
        rank: This process's number in the job.
        ranks: Of the job, more than one.
        members: How many consecutive ranks share a clip.
        asked: Whether this process was asked to stop.
    """

    numbers: ClassVar = itertools.count()

    def __init__(
        self, store: Store, rank: int, ranks: int, members: int, asked: Callable[[], bool]
    ) -> None:
        # a request of the run before is not this one's; and others' waiting does not hold it up
        self.store = PrefixStore(f"tokenflow/{next(self.numbers)}", store.clone())
        self.rank, self.next, self.members, self.own = rank, (rank + 1) % ranks, members, asked
        self.over, self.stop, self.bereft, self.silent = Event(), False, False, 0
        self.thread = Thread(target=self.listen, daemon=True)
        for thread in (self.thread, Thread(target=self.watch, daemon=True)):
            thread.start()

    @classmethod
    def of_job(cls, members: int, asked: Callable[[], bool]) -> Channel:
        """That of all processes that torch.distributed knows of."""
        return cls(_get_default_store(), get_rank(), get_world_size(), members, asked)

    def asked(self) -> bool:
        """Whether this process or another was asked to stop, or one is lost."""
        return self.stop or self.silent > LOST or self.own()

    def close(self, failed: bool = False) -> None:
        """Tells the others that this process is done; or to stop, if it failed or was asked to."""
        self.stop = self.stop or failed or self.own()
        self.over.set()
        self.thread.join(2 * BEAT)  # longer only if the store does not answer

    def listen(self) -> None:
        """Tells and hears once in a `BEAT`, until the channel is closed."""
        other, last, quiet = f"{self.next}", b"", 0
        group, others = (f"lost from {r // self.members}" for r in (self.rank, self.next))
        try:
            for beat in itertools.count():
                over = self.over.wait(BEAT)
                self.store.set(f"{self.rank}", DONE if over else f"{beat}")
                sign = self.store.get(other) if self.store.check([other]) else b""
                last, quiet = sign, 0 if sign != last else quiet + 1
                lost = sign != DONE.encode() and quiet > LOST
                if lost:
                    self.store.set(others, other)
                if self.stop or lost or self.own():
                    self.store.set(STOP, "")
                if over:
                    return
                self.silent = 0
                if lost and not self.stop:
                    print(f"rank {other} is lost; all stop where they can go on", file=sys.stderr)
                self.bereft = self.store.check([group])
                self.stop = self.stop or self.store.check([STOP])
        except RuntimeError:  # the first process holds the store, and has ended
            self.stop, self.bereft = True, self.rank < self.members

    def watch(self) -> None:
        """Ends this process where another that it needs is lost, unless the channel is closed."""
        hopeless = 0
        while not self.over.wait(BEAT):
            self.silent += 1
            lost = self.bereft or (self.rank < self.members and self.silent > LOST)
            hopeless = hopeless + 1 if lost else 0
            if hopeless > HOPELESS:
                faulthandler.dump_traceback()
                print(
                    f"rank {self.rank} ends, as it waits in the above for a process that is lost; "
                    f"start again, and the run goes on",
                    file=sys.stderr, flush=True,
                )  # fmt: skip
                os._exit(1)
