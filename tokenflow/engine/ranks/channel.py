"""What the processes of a job tell each other, for which none of them waits."""

from __future__ import annotations

import faulthandler
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread
from time import sleep
from typing import ClassVar

from torch.distributed import get_rank, get_world_size
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store

BEAT = 1.0
"""Seconds between a process's signs of life."""
LOST = 30
"""Beats without one after which a process counts as lost; a busy one may be late.

Beats are counted, and no seconds, as a suspended job gets no older.
"""
SLOW = 10 * LOST
"""As many where a result is written: while its index is moved to the front, nothing else runs."""
HOPELESS, STUCK = 20, 300
"""Beats after which a process ends that is still there, where one is lost that it shares a clip
with, or another."""
DONE, STOP, LOSS, WRITES = "done", "stop", "lost", "writes"


class Channel:
    """A request to stop reaches all processes of a job, and so does the loss of one.

    Every process gives signs of life to the job's store, and looks there for those of the next one
    and for requests; in a thread of its own, until the channel is closed. When one is lost all
    stop where they can go on. Who cannot, as it waits for that one, just ends, and says where.

    Args:
        store: Where all processes meet; the first one holds it, or its launcher.
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
        self.rank, self.next, self.own = rank, (rank + 1) % ranks, asked
        self.group, self.others = (f"{LOSS} from {r // members}" for r in (rank, self.next))
        self.with_first = members > 1 and rank < members
        self.over, self.stop, self.failed, self.writes = Event(), False, False, False
        self.silent, self.loss, self.bereft, self.ended = 0, False, False, False
        """Beats since the store answered; whether one is lost, and one of this group; whether the
        store has ended."""
        self.thread = Thread(target=self.listen, daemon=True)
        for thread in (self.thread, Thread(target=self.watch, daemon=True)):
            thread.start()

    @classmethod
    def of_job(cls, members: int | None, asked: Callable[[], bool]) -> Channel:
        """That of all processes that torch.distributed knows of."""
        ranks = get_world_size()
        return cls(_get_default_store(), get_rank(), ranks, members or ranks, asked)

    def asked(self) -> bool:
        """Whether this process or another was asked to stop, or one is lost."""
        return self.stop or self.silent > LOST or self.own()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """A block in which a result is written, and this process may be silent for longer."""
        self.writes = True
        try:
            yield
        finally:
            self.writes = False

    def close(self, stopped: bool = False, failed: bool = False) -> None:
        """Tells the others that this process is done; or to stop, as it did or was asked to.

        One that `failed` counts as lost, as others may wait for it.
        """
        self.failed = failed
        self.stop = self.stop or stopped or failed or self.own()
        self.over.set()
        self.thread.join(5 * BEAT)  # longer only if the store does not answer

    def listen(self) -> None:
        """Tells and hears once in a `BEAT`, until the channel is closed."""
        other, last, quiet, lost = f"{self.next}", "", 0, False
        try:
            for beat in itertools.count():
                over = self.over.wait(BEAT)
                own = DONE if over else f"{WRITES if self.writes else ''} {beat}"
                self.store.set(f"{self.rank}", own)
                sign = self.store.get(other).decode() if self.store.check([other]) else ""
                back = lost and sign != last
                last, quiet = sign, 0 if sign != last else quiet + 1
                lost = sign != DONE and quiet > (SLOW if sign.startswith(WRITES) else LOST)
                if back:
                    self.store.delete_key(self.others)
                for mark, true in (
                    (self.others, lost), (self.group, over and self.failed),
                    (LOSS, lost or (over and self.failed)), (STOP, self.stop or lost or self.own()),
                ):  # fmt: skip
                    if true:
                        self.store.set(mark, "")
                if over:
                    if self.rank == 0 and self.store.check([LOSS]):
                        sleep(3 * BEAT)  # others hear of it; the store may end with this process
                    return
                self.silent = 0
                if lost and not self.stop:
                    say(f"rank {other} is lost; all stop where they can go on")
                self.bereft, self.loss = (self.store.check([m]) for m in (self.group, LOSS))
                self.stop = self.stop or self.store.check([STOP])
        except RuntimeError:  # the store has ended, and the first process with it
            self.loss = self.loss or not self.stop  # which else has just stopped first
            self.bereft = self.bereft or self.with_first
            self.stop = self.ended = True

    def watch(self) -> None:
        """Ends this process if it does not stop by itself when one is lost."""
        stuck = hopeless = 0
        while not self.over.wait(BEAT):
            self.silent += 1
            quiet = self.silent > LOST and not self.ended
            stuck = stuck + 1 if quiet or self.loss else 0
            hopeless = hopeless + 1 if self.bereft or (quiet and self.with_first) else 0
            if stuck > STUCK or hopeless > HOPELESS:
                try:
                    say(f"rank {self.rank} ends, as a process is lost that it waits for, here:")
                    faulthandler.dump_traceback()
                finally:
                    os._exit(1)


def say(line: str) -> None:
    """A line on stderr, if there still is one."""
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)
