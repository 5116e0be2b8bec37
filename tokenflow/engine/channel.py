"""What processes that edit different clips tell each other, for which none of them waits."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from threading import Event, Thread
from time import monotonic
from typing import ClassVar

from torch.distributed import get_rank, get_world_size
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store

BEAT = 1.0
"""Seconds between a process's signs of life."""
LOST = 30.0
"""Seconds without one after which a process counts as lost; a busy one may be late."""
DONE, STOP = "done", "stop"


class Channel:
    """A request to stop reaches all processes of a job, and so does the loss of one.

    Every process gives signs of life to the job's store, and looks there for those of the next one
    and for requests; in a thread of its own, until the channel is closed.

    Args:
        store: Where all processes meet.
        rank: This process's number in the job.
        ranks: Of the job, more than one.
        asked: Whether this process was asked to stop.
    """

    numbers: ClassVar = itertools.count()

    def __init__(self, store: Store, rank: int, ranks: int, asked: Callable[[], bool]) -> None:
        # a request of the run before is not this one's; and others' waiting does not hold it up
        self.store = PrefixStore(f"tokenflow/{next(self.numbers)}", store.clone())
        self.rank, self.next, self.own = rank, (rank + 1) % ranks, asked
        self.over, self.stop, self.heard = Event(), False, monotonic()
        self.thread = Thread(target=self.listen, daemon=True)
        self.thread.start()

    @classmethod
    def of_job(cls, asked: Callable[[], bool]) -> Channel:
        """That of all processes that torch.distributed knows of."""
        return cls(_get_default_store(), get_rank(), get_world_size(), asked)

    def asked(self) -> bool:
        """Whether this process or another was asked to stop, or one is lost."""
        cut_off = not self.over.is_set() and monotonic() - self.heard > LOST
        return self.stop or cut_off or self.own()

    def close(self, failed: bool = False) -> None:
        """Tells the others that this process is done; or to stop, if it failed or was asked to."""
        self.stop = self.stop or failed or self.own()
        self.over.set()
        self.thread.join(2 * BEAT)  # longer only if the store does not answer

    def listen(self) -> None:
        """Tells and hears once in a `BEAT`, until the channel is closed."""
        other, last, since = f"{self.next}", b"", monotonic()
        try:
            for beat in itertools.count():
                over = self.over.wait(BEAT)
                self.store.set(f"{self.rank}", DONE if over else f"{beat}")
                sign = self.store.get(other) if self.store.check([other]) else b""
                if sign != last:
                    last, since = sign, monotonic()
                lost = sign != DONE.encode() and monotonic() - since > LOST
                if self.stop or lost or self.own():
                    self.store.set(STOP, "")
                if over:
                    return
                self.heard = monotonic()
                if lost and not self.stop:
                    print(f"rank {other} is lost; all stop where they can go on", file=sys.stderr)
                self.stop = self.stop or self.store.check([STOP])
        except RuntimeError:  # the first process holds the store, and has ended
            self.stop = True
