from itertools import pairwise

import pytest

from tokenflow.engine.keyframes import seams, spans


@pytest.mark.parametrize("windows", [1, 2, 7, 8, 9, 30])
@pytest.mark.parametrize("span", [1, 2, 3, 8])
@pytest.mark.parametrize("anchors", [0, 1, 4])
@pytest.mark.parametrize("step", [0, 1, 2])
def test_every_window_is_in_one_span(windows: int, span: int, anchors: int, step: int) -> None:
    found = spans(windows, span, anchors, step)
    assert [number for here, _ in found for number in here] == list(range(windows))
    for here, keyframes in found:
        assert len(here) <= span
        assert len(keyframes) <= span + 2 + anchors
        assert list(keyframes) == sorted(set(keyframes))
        around = {here.start - 1, *here, here.stop} & set(range(windows))
        assert around <= set(keyframes) <= set(range(windows))


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("span", [5, 6, 100])
def test_one_span_that_is_long_enough_is_everything(span: int, step: int) -> None:
    assert spans(5, span, 2, step) == [(range(5), (0, 1, 2, 3, 4))]


def test_anchors_are_the_same_in_all_spans_and_spread_over_the_clip() -> None:
    assert [keyframes for _, keyframes in spans(12, 4, 2, 0)] == [
        (0, 1, 2, 3, 4, 9),
        (3, 4, 5, 6, 7, 8, 9),
        (3, 7, 8, 9, 10, 11),
    ]


def test_without_anchors_keyframes_see_their_own_span_and_its_sides() -> None:
    assert [keyframes for _, keyframes in spans(6, 2, 0, 0)] == [(0, 1, 2), (1, 2, 3, 4), (3, 4, 5)]


@pytest.mark.parametrize(("span", "windows"), [(2, 9), (4, 30), (8, 30)])
def test_no_seam_is_at_its_place_in_the_next_step(span: int, windows: int) -> None:
    for step, after in pairwise(range(4)):
        here, there = seams(windows, span, step), seams(windows, span, after)
        assert set(here) & set(there) == {0, windows}
    assert seams(windows, span, 0) == seams(windows, span, 2)
