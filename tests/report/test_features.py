"""Pictures of features, from tokens whose answers are known."""

from __future__ import annotations

import math

import torch

from tests.report.making import bar
from tokenflow.propagation import Correspondence, NNField, Window
from tokenflow.report.features import (
    draw,
    links,
    most_between,
    place_colours,
    principal,
    tinted,
)
from tokenflow.runs.observed import Observed

WINDOW = Window(
    frames=(0, 1, 2, 3),
    keyframes=(0, 4),
    neighbours=torch.tensor([[0, 0], [0, 1], [0, 1], [0, 1]]),
    blend=torch.tensor([[1.0, 0.0], [0.7, 0.3], [0.5, 0.5], [0.3, 0.7]]),
    height=2,
    width=3,
)
LAST = Window((4, 5), (4,), torch.zeros(2, 2, dtype=torch.long), torch.ones(2, 2) / 2, 2, 3)


def test_the_first_component_is_the_direction_of_most_variance() -> None:
    tokens, turn = torch.zeros(2, 3, 4, 5), torch.arange(24).reshape(2, 3, 4) * math.tau / 24
    tokens[..., 1], tokens[..., 3] = 9 * turn.cos(), 3 * turn.sin()
    maps = principal(tokens)
    assert maps.shape == (2, 3, 3, 4)
    for component, values in enumerate((turn.cos(), turn.sin())):
        assert torch.allclose(maps[:, component], (values + 1) / 2, atol=1e-5)


def test_components_of_equal_tokens_are_finite() -> None:
    assert principal(torch.ones(2, 3, 4, 5)).isfinite().all()


def test_the_frame_most_between_its_keyframes() -> None:
    found = Correspondence(torch.zeros(4, 6, 1, dtype=torch.long), torch.ones(4, 6, 1))
    last = Correspondence(torch.zeros(2, 6, 1, dtype=torch.long), torch.ones(2, 6, 1))
    assert most_between([(WINDOW, found), (LAST, last)]) == 2
    assert most_between([(LAST, last)]) == 5  # beside its only keyframe


def test_a_token_has_the_colour_of_where_it_comes_from() -> None:
    source, places = torch.rand(6, 3, 4, 6), place_colours(2, 3)
    keys = torch.eye(12).reshape(2, 6, 12)
    here = keys[1].flip(0).expand(4, -1, -1)  # turned by half a turn
    found = NNField().correspond(here, keys, WINDOW)
    pictures = links([(WINDOW, found)], source, 2)
    assert [caption for caption, _ in pictures] == [
        "keyframe 0", "frame 2, from 0", "frame 2, from 4", "keyframe 4"
    ]  # fmt: skip
    assert torch.allclose(pictures[0][1], tinted(source[0], places, WINDOW))
    assert torch.allclose(pictures[2][1], tinted(source[2], places.flip(0), WINDOW))
    assert torch.allclose(pictures[3][1], tinted(source[4], places, WINDOW))


def test_a_token_of_several_places_has_their_mean_colour() -> None:
    source, places = torch.rand(6, 3, 4, 6), place_colours(2, 3)
    indices = torch.tensor([0, 5, 6]).expand(4, 6, 3)  # two taps in one keyframe, one in the other
    weights = torch.tensor([0.1, 0.3, 0.6]).expand(4, 6, 3)
    pictures = links([(WINDOW, Correspondence(indices, weights))], source, 1)
    mean = (0.25 * places[0] + 0.75 * places[5]).expand(6, 3)
    assert torch.allclose(pictures[1][1], tinted(source[1], mean, WINDOW))
    assert torch.allclose(pictures[2][1], tinted(source[1], places[:1].expand(6, 3), WINDOW))


def test_a_frame_with_one_keyframe_has_two_pictures() -> None:
    found = Correspondence(torch.zeros(4, 6, 1, dtype=torch.long), torch.ones(4, 6, 1))
    assert [c for c, _ in links([(WINDOW, found)], torch.rand(6, 3, 4, 6), 0)] == [
        "keyframe 0", "frame 0, from 0"
    ]  # fmt: skip


def test_the_frame_that_was_asked_for() -> None:
    found = Correspondence(torch.zeros(4, 6, 1, dtype=torch.long), torch.ones(4, 6, 1))
    seen = Observed("up", 0, 2, [0, 3], torch.rand(2, 2, 3, 8), [(WINDOW, found)])
    drawn = draw(seen, bar(5).frames, 3)
    assert (drawn.frame, drawn.size, len(drawn.links)) == (3, "3×2", 4)
