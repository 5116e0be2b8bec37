"""Which windows and frames of a clip a rank has."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class WindowShard:
    """The consecutive windows of a clip that one rank edits.

    A rank with no window recomputes the first one, alone, and its result is discarded: so all
    ranks call the same collectives.

    Attributes:
        windows: Of the whole clip.
        own: Which of them are this rank's, by number.
        counts: How many windows each rank contributes, one with no window 0.
        idle: Whether this rank has none.
    """

    windows: Sequence[range]
    own: range
    counts: tuple[int, ...]
    idle: bool = False

    @classmethod
    def of(cls, windows: Sequence[range], rank: int, ranks: int) -> WindowShard:
        """A rank's part: each has as many windows, the first ones one more."""
        each, more = divmod(len(windows), ranks)
        counts = tuple(each + (other < more) for other in range(ranks))
        first = sum(counts[:rank])
        own = range(first, first + counts[rank])
        return cls(windows, own or range(1), counts, idle=not own)

    @property
    def halo(self) -> range:
        """The windows whose keyframes this rank sees: its own, and one more at each side."""
        if self.idle:
            return self.own
        return range(max(self.own.start - 1, 0), min(self.own.stop + 1, len(self.windows)))

    @property
    def frames(self) -> range:
        """The frames of this rank's windows."""
        return self.positions(self.own)

    @property
    def frame_counts(self) -> tuple[int, ...]:
        """How many frames each rank contributes."""
        ends = itertools.pairwise([0, *itertools.accumulate(self.counts)])
        return tuple(sum(map(len, self.windows[a:b])) for a, b in ends)

    def positions(self, numbers: range) -> range:
        """The frames of consecutive windows."""
        return range(self.windows[numbers[0]].start, self.windows[numbers[-1]].stop)
