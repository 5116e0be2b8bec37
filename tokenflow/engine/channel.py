"""What processes that edit different clips tell each other, for which none of them waits."""

from __future__ import annotations

import atexit
import sys
from collections.abc import Callable
from threading import Event, Thread
from time import monotonic

from torch.distributed import get_rank, get_world_size
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store

BEAT = 1.0
"""Seconds between a process's signs of life."""
LOST = 30.0
"""Seconds without one after which a process counts as lost; a busy one may be late."""
STOP = "stop"


class Channel:
    """A request to stop reaches all processes of a job, and so does the loss of one.

    Every process gives signs of life to the job's store, and looks there for those of the next one
    and for requests; in a thread of its own, until the process ends.

    Args:
        store: Where all processes meet.
        rank: This process's number in the job.
        ranks: Of the job, more than one.
        asked: Whether this process was asked to stop.
    """

    def __init__(self, store: Store, rank: int, ranks: int, asked: Callable[[], bool]) -> None:
        self.store = PrefixStore("tokenflow", store.clone())  # not held up by others' waiting
        self.rank, self.next, self.own = rank, (rank + 1) % ranks, asked
        self.over, self.stop = Event(), False
        self.thread = Thread(target=self.listen, daemon=True)
        self.thread.start()
        atexit.register(self.close)

    @classmethod
    def of_job(cls, asked: Callable[[], bool]) -> Channel:
        """That of all processes that torch.distributed knows of."""
        return cls(_get_default_store(), get_rank(), get_world_size(), asked)

    def asked(self) -> bool:
        """Whether this process or another was asked to stop, or one is lost."""
        return self.stop or self.own()

    def close(self) -> None:
        """Gives a last sign of life, with which goes a request to this process."""
        self.over.set()
        self.thread.join()

    def listen(self) -> None:
        """Tells and hears once in a `BEAT`, until the channel is closed."""
        other, last, since = f"{self.next}", b"", monotonic()
        over, beats = False, 0
        try:
            while not over:
                over, beats = self.over.wait(BEAT), beats + 1
                self.store.set(f"{self.rank}", f"{beats}")
                sign = self.store.get(other) if self.store.check([other]) else b""
                if sign != last:
                    last, since = sign, monotonic()
                lost = monotonic() - since > LOST
                if lost and not self.stop:
                    print(f"rank {other} is lost; all stop where they can go on", file=sys.stderr)
                if lost or self.own():
                    self.store.set(STOP, "")
                self.stop = self.stop or self.store.check([STOP])
        except RuntimeError:  # the first process holds the store, and has ended
            self.stop = True
