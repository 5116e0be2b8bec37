"""What each of the ranks that share a clip has of it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass


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

    @classmethod
    def of(cls, windows: Sequence[range], rank: int, ranks: int) -> Share:
        """A rank's part: each has as many windows, the first ones one more."""
        each, more = divmod(len(windows), ranks)
        counts = tuple(each + (other < more) for other in range(ranks))
        first = sum(counts[:rank])
        own = range(first, first + counts[rank])
        return cls(windows, own or range(1), counts, idle=not own)

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
