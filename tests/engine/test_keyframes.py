import inspect
import itertools
import math
from collections.abc import Sequence

import pytest
import torch

from tokenflow.engine.keyframes import (
    Blend,
    Keyframes,
    Neighbours,
    draw_keyframes,
    leading,
    neighbourhood,
    seams,
    spans,
    split_windows,
)
from tokenflow.errors import InputError

# more than float32's rounding of a weight below 1, 6e-8
WEIGHT = 1e-6
NINETEEN = split_windows(19, 5)  # the last window has four frames


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def taken(
    frames: range,
    windows: Sequence[range],
    keyframes: Sequence[int],
    neighbours: Neighbours = "bracketing",
    blend: Blend = "sigmoid",
) -> dict[int, dict[int, float]]:
    """For each frame, the keyframes by position in the clip that it takes from, and how much."""
    window, used = neighbourhood(frames, windows, keyframes, neighbours, blend)
    assert window.frames == tuple(frames)
    assert window.keyframes == tuple(keyframes[k] for k in used)
    assert list(window.keyframes) == sorted(set(window.keyframes))
    assert (window.blend >= 0).all()
    assert torch.allclose(window.blend.sum(1), torch.ones(len(frames)), rtol=0, atol=WEIGHT)
    result: dict[int, dict[int, float]] = {}
    for frame, pair, weights in zip(
        frames, window.neighbours.tolist(), window.blend.tolist(), strict=True
    ):
        here = result.setdefault(frame, {})
        for k, weight in zip(pair, weights, strict=True):
            here[window.keyframes[k]] = here.get(window.keyframes[k], 0.0) + weight
    return result


@pytest.mark.parametrize("frames", [1, 2, 3, 7, 8, 9, 16, 41])
@pytest.mark.parametrize("every", [1, 2, 3, 8, 50])
def test_windows_cover_all_frames_in_order(frames: int, every: int) -> None:
    windows = split_windows(frames, every)
    assert [frame for window in windows for frame in window] == list(range(frames))
    assert all(len(window) == every for window in windows[:-1])
    assert 1 <= len(windows[-1]) <= every


@pytest.mark.parametrize("every", [0, -3])
def test_windows_need_a_frame(every: int) -> None:
    with pytest.raises(InputError, match=f"keyframe_every must be at least 1 frame, got {every}"):
        split_windows(9, every)


@pytest.mark.parametrize("policy", ["random", "center", "first", 0, 3, 7])
def test_every_window_has_its_keyframe(policy: Keyframes) -> None:
    for step in range(20):
        drawn = draw_keyframes(NINETEEN, policy, 0, "clip", step)
        assert len(drawn) == len(NINETEEN)
        assert all(k in window for k, window in zip(drawn, NINETEEN, strict=True))


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("center", [2, 7, 12, 17]),
        ("first", [0, 5, 10, 15]),
        (0, [0, 5, 10, 15]),
        (3, [3, 8, 13, 18]),
        (4, [4, 9, 14, 18]),  # the last window's last
    ],
)
def test_fixed_policies(policy: Keyframes, expected: list[int]) -> None:
    assert draw_keyframes(NINETEEN, policy, 0, "clip", 0) == expected
    assert draw_keyframes(NINETEEN, policy, 1, "other", 9) == expected


@pytest.mark.parametrize("policy", ["last", -1, 1.5, True, None])
def test_unknown_policies(policy: Keyframes) -> None:
    unchecked = inspect.unwrap(draw_keyframes)  # without the types that only the tests check
    with pytest.raises(InputError, match=rf"keyframes must be 'random'.* got {policy!r}"):
        unchecked(NINETEEN, policy, 0, "clip", 0)


def test_draws_depend_on_seed_clip_and_step_alone() -> None:
    def steps(seed: int, clip: str) -> list[list[int]]:
        return [draw_keyframes(NINETEEN, "random", seed, clip, step) for step in range(50)]

    first = steps(0, "clip")
    torch.manual_seed(123)
    torch.rand(1)
    assert steps(0, "clip") == first
    assert steps(1, "clip") != first
    assert steps(0, "other") != first
    # 500 distinct keyframe sets: the same one twice in a row has a chance of 1 in 500 at a step
    assert sum(a == b for a, b in itertools.pairwise(first)) < 3


def test_draws_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    draw_keyframes(NINETEEN, "random", 0, "clip", 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_draws_are_uniform() -> None:
    steps = 1000
    counts = torch.zeros(19)
    for step in range(steps):
        counts[draw_keyframes(NINETEEN, "random", 0, "clip", step)] += 1
    share = torch.tensor([1 / len(w) for w in NINETEEN for _ in w])
    # five standard deviations of a binomial count
    assert ((counts - steps * share).abs() < 5 * (steps * share * (1 - share)).sqrt()).all()


@pytest.mark.parametrize("keyframes", [[2, 7, 12, 17], [0, 9, 10, 18], [4, 5, 14, 15]])
@pytest.mark.parametrize("blend", ["sigmoid", "linear"])
def test_bracketing_is_the_nearest_keyframe_before_and_after(
    keyframes: list[int], blend: Blend
) -> None:
    result = taken(range(19), NINETEEN, keyframes, "bracketing", blend)
    for frame in range(19):
        before = max((k for k in keyframes if k <= frame), default=None)
        after = min((k for k in keyframes if k >= frame), default=None)
        if before is None or after is None or before == after:
            only = before if before is not None else after
            weights = {only: 1.0}
        else:
            ratio = (frame - before) / (after - before)
            weight = sigmoid(ratio) if blend == "sigmoid" else ratio
            weights = {before: 1 - weight, after: weight}
        assert {k: w for k, w in result[frame].items() if w} == pytest.approx(weights, abs=WEIGHT)


@pytest.mark.parametrize("blend", ["sigmoid", "linear"])
def test_a_keyframe_takes_from_itself_alone(blend: Blend) -> None:
    result = taken(range(19), NINETEEN, [0, 9, 10, 18], "bracketing", blend)
    for keyframe in (0, 9, 10, 18):
        assert result[keyframe] == {keyframe: 1.0}


def test_a_window_has_up_to_three_neighbours() -> None:
    keyframes = [2, 7, 12, 17]
    window, used = neighbourhood(NINETEEN[1], NINETEEN, keyframes)
    assert window.keyframes == (2, 7, 12)
    assert used == [0, 1, 2]
    last, used = neighbourhood(NINETEEN[3], NINETEEN, keyframes)
    assert last.keyframes == (12, 17)
    assert used == [2, 3]


@pytest.mark.parametrize("blend", ["sigmoid", "linear"])
def test_previous_is_the_published_code(blend: Blend) -> None:
    keyframes, centers = [0, 9, 10, 18], [2, 7, 12, 17]
    result = taken(range(19), NINETEEN, keyframes, "previous", blend)
    for number, window in enumerate(NINETEEN):
        for frame in window:
            if number == 0:
                assert result[frame] == {keyframes[0]: 1.0}
                continue
            own, previous = abs(frame - centers[number]), abs(frame - centers[number - 1])
            ratio = previous / (own + previous)
            weight = sigmoid(ratio) if blend == "sigmoid" else ratio
            expected = {keyframes[number]: weight, keyframes[number - 1]: 1 - weight}
            assert result[frame] == pytest.approx(expected, abs=WEIGHT)


@pytest.mark.parametrize("neighbours", ["bracketing", "previous"])
@pytest.mark.parametrize("run", [1, 2, 3, 4, 7, 19])
def test_a_frame_takes_the_same_in_any_run_of_frames(neighbours: Neighbours, run: int) -> None:
    keyframes = draw_keyframes(NINETEEN, "random", 0, "clip", 0)
    together: dict[int, dict[int, float]] = {}
    for start in range(0, 19, run):
        part = range(start, min(start + run, 19))
        together |= taken(part, NINETEEN, keyframes, neighbours)
    by_window: dict[int, dict[int, float]] = {}
    for window in NINETEEN:
        by_window |= taken(window, NINETEEN, keyframes, neighbours)
    assert together == by_window


@pytest.mark.parametrize("neighbours", ["bracketing", "previous"])
def test_one_frame_has_itself(neighbours: Neighbours) -> None:
    assert taken(range(1), split_windows(1, 8), [0], neighbours) == {0: {0: 1.0}}


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
    for step, after in itertools.pairwise(range(4)):
        here, there = seams(windows, span, step), seams(windows, span, after)
        assert set(here) & set(there) == {0, windows}
    assert seams(windows, span, 0) == seams(windows, span, 2)


def test_a_window_knows_its_step_and_site() -> None:
    window, _ = neighbourhood(range(3), split_windows(3, 2), [1, 2], step=4, steps=9)
    assert (window.step, window.steps) == (4, 9)
    here = window.at_site("up", tokens=8, size=(8, 16))
    assert (here.site, here.height, here.width) == ("up", 2, 4)
    assert here.frames == window.frames


FIVE = [1, 4, 9, 12, 17]


@pytest.mark.parametrize(
    ("step", "leaders"),
    [
        (0, {1: 0, 3: 2}),
        (1, {0: 1, 2: 1, 4: 3}),  # the first has none before it
        (2, {1: 2, 3: 4}),
        (3, {0: 1, 2: 3, 4: 3}),
        (4, {1: 0, 3: 2}),
    ],
)
def test_every_other_keyframe_leads_one_beside_it(step: int, leaders: dict[int, int]) -> None:
    window = leading(FIVE, range(5), range(5), step)
    assert window.frames == window.keyframes == tuple(FIVE)
    found = dict(enumerate(window.neighbours[:, 0].tolist()))
    assert found == {number: number for number in range(5)} | leaders
    assert window.blend.tolist() == [[float(number in leaders), 0.0] for number in range(5)]


@pytest.mark.parametrize("step", range(4))
def test_leaders_do_not_depend_on_ranks(step: int) -> None:
    def led(own: range, held: range) -> dict[int, tuple[int, float]]:
        window = leading(FIVE, own, held, step)
        pairs = zip(window.neighbours[:, 0].tolist(), window.blend[:, 0].tolist(), strict=True)
        at = dict(zip(window.frames, pairs, strict=True))
        return {frame: (window.keyframes[k], share) for frame, (k, share) in at.items()}

    parts = led(range(2), range(3)) | led(range(2, 5), range(1, 5))
    assert parts == led(range(5), range(5))


def test_a_clips_only_keyframe_has_no_leader() -> None:
    for step in range(4):
        assert leading([3], range(1), range(1), step).blend.tolist() == [[0.0, 0.0]]
