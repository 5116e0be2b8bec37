"""Which keyframes attend to each other where attention is bounded, so that cost is linear."""

from __future__ import annotations

import itertools
from typing import NamedTuple


class Span(NamedTuple):
    """Consecutive windows, and the keyframes that attend to each other for them, by number.

    Attributes:
        windows: Whose frames take their features from these keyframes.
        keyframes: Ascending: of the windows, of one more at each side, and the anchors.
    """

    windows: range
    keyframes: tuple[int, ...]


def spans(windows: int, span: int, anchors: int, step: int) -> list[Span]:
    """At most `span` windows each, with one joint pass for each; together all of a clip's.

    The anchors lie in the middle of that many equal parts of the clip and are in every pass. The
    seams between spans lie elsewhere in each step than in the one before. Where one span is enough,
    all keyframes attend to each other.
    """
    everywhere = {(2 * i + 1) * windows // (2 * anchors) for i in range(anchors)}
    found = []
    for start, stop in itertools.pairwise(seams(windows, span, step)):
        beside = range(max(start - 1, 0), min(stop + 1, windows))
        found.append(Span(range(start, stop), tuple(sorted({*beside, *everywhere}))))
    return found


def seams(windows: int, span: int, step: int) -> list[int]:
    """Where spans begin, and where the last one ends."""
    inside = range(shift(span, step), windows, span) if span < windows else ()
    return sorted({0, *inside, windows})


def shift(span: int, step: int) -> int:
    """How far on a step's seams lie: half a span in every other one."""
    return step % 2 * (span // 2)
