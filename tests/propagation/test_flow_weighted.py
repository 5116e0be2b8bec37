import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tokenflow.errors import InputError
from tokenflow.propagation import DIS, Correspondence, FlowWeighted, Motion, NNField, Window

from .measuring import Largest

FRAMES, KEYFRAMES, HEIGHT, WIDTH, CHANNELS = 5, 3, 4, 6, 8
TOKENS = HEIGHT * WIDTH


def motion(scale: float = 1.5, inconsistency: float = 0.5, seed: int = 2) -> Motion:
    generator = torch.Generator().manual_seed(seed)
    return Motion(
        scale * torch.randn(FRAMES, 2, TOKENS, 2, generator=generator),
        inconsistency * torch.rand(FRAMES, 2, TOKENS, generator=generator),
    )


WINDOW = Window(
    frames=(3, 4, 5, 6, 7),
    keyframes=(1, 5, 9),
    neighbours=torch.tensor([[0, 1], [0, 1], [1, 1], [1, 2], [1, 2]]),
    blend=torch.tensor([[0.6, 0.4], [0.3, 0.7], [1.0, 0.0], [0.5, 0.5], [0.25, 0.75]]),
    height=HEIGHT,
    width=WIDTH,
    motion=motion(),
)
STILL = dataclasses.replace(WINDOW, motion=motion(0.0, 0.0))


def tokens(frames: int, seed: int) -> Tensor:
    """Alike enough for flow and features to agree in some places and not in others."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(frames, TOKENS, CHANNELS, generator=generator) + 0.5


SOURCE, KEYS = tokens(FRAMES, 0), tokens(KEYFRAMES, 1)


def found(window: Window = WINDOW, **options: Any) -> Correspondence:
    return FlowWeighted(**options).correspond(SOURCE, KEYS, window)


def dense(correspondence: Correspondence) -> Tensor:
    """The correspondence as a matrix over all keyframes' tokens."""
    empty = torch.zeros(FRAMES, TOKENS, KEYFRAMES * TOKENS)
    return empty.scatter_add(2, correspondence.indices, correspondence.weights)


def cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    return float(a @ b / (a.norm() * b.norm()))


def naive_weights(
    window: Window, inconsistency: float = 0.5, disagreement: float = 0.35
) -> tuple[Tensor, list[float]]:
    """docs/method.md's formula, one token of one frame and one neighbour at a time."""
    result, trusts = torch.zeros(FRAMES, TOKENS, KEYFRAMES, TOKENS, dtype=torch.float64), []
    assert window.motion is not None
    for f, side, p in itertools.product(range(FRAMES), range(2), range(TOKENS)):
        k, blend = int(window.neighbours[f, side]), float(window.blend[f, side])
        key = [vector.double() / vector.double().norm() for vector in KEYS[k]]
        similar = [cosine(SOURCE[f, p], vector) for vector in key]
        match = max(range(TOKENS), key=lambda j: similar[j])
        dx, dy = window.motion.displacement[f, side, p].tolist()
        x, y = p % WIDTH + dx, p // WIDTH + dy
        inside = -0.5 <= x <= WIDTH - 0.5 and -0.5 <= y <= HEIGHT - 0.5
        x, y = min(max(x, 0), WIDTH - 1), min(max(y, 0), HEIGHT - 1)
        taps = [
            (row * WIDTH + column, (1 - abs(x - column)) * (1 - abs(y - row)))
            for row, column in itertools.product(range(HEIGHT), range(WIDTH))
            if abs(x - column) < 1 and abs(y - row) < 1
        ]
        here = cosine(SOURCE[f, p], sum((b * key[j] for j, b in taps), torch.zeros(CHANNELS)))
        mean = sum(similar) / TOKENS
        g = max(similar[match] - here, 0) / (similar[match] - mean)
        e = float(window.motion.inconsistency[f, side, p])
        w = inside * math.exp(-((e / inconsistency) ** 4) - (g / disagreement) ** 4)
        if window.frames[f] == window.keyframes[k]:
            w = 1.0
        trusts.append(w)
        for j, b in taps:
            result[f, p, k, j] += blend * w * b
        result[f, p, k, match] += blend * (1 - w)
    return result.flatten(2), trusts


@pytest.mark.parametrize(
    "options", [{}, {"inconsistency": 0.2}, {"disagreement": 1.5}, {"block": 7}]
)
def test_agrees_with_a_naive_loop(options: dict[str, Any]) -> None:
    scales = {name: value for name, value in options.items() if name != "block"}
    expected, trusts = naive_weights(WINDOW, **scales)
    assert min(trusts) < 0.01
    assert max(trusts) > 0.8
    assert sum(0.1 < w < 0.9 for w in trusts) > 5, "all or nothing would not show the formula"
    # float32 in the similarities, the shares and the exponent
    assert torch.allclose(dense(found(**options)).double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1000.0])
def test_is_a_sparse_row_stochastic_matrix(dtype: torch.dtype, scale: float) -> None:
    window = dataclasses.replace(WINDOW, motion=motion(scale, scale))
    result = FlowWeighted().correspond((SOURCE * scale).to(dtype), KEYS.to(dtype), window)
    assert result.indices.shape == result.weights.shape == (FRAMES, TOKENS, 10)
    assert result.indices.dtype == torch.long
    assert result.weights.dtype == torch.float32
    assert 0 <= result.indices.min() <= result.indices.max() < KEYFRAMES * TOKENS
    assert (result.weights >= 0).all()
    # ten float32 numbers below 1
    assert torch.allclose(result.weights.sum(-1), torch.ones(FRAMES, TOKENS), rtol=0, atol=1e-6)


def test_neighbours_have_their_blend() -> None:
    per_keyframe = dense(found()).unflatten(2, (KEYFRAMES, TOKENS)).sum(-1)
    expected = torch.zeros(FRAMES, KEYFRAMES).scatter_add(1, WINDOW.neighbours, WINDOW.blend)
    assert torch.allclose(per_keyframe, expected[:, None].expand_as(per_keyframe), atol=1e-6)


def test_a_keyframe_is_itself() -> None:
    """Even where another token looks the same and where the features contradict the flow."""
    keys = KEYS.clone()
    keys[1, 7] = keys[1, 3]
    source = SOURCE.clone()
    source[2] = keys[1]
    here = motion()
    here.displacement[2] = here.inconsistency[2] = 0
    window = dataclasses.replace(WINDOW, motion=here)
    values = torch.randn(2, KEYFRAMES, TOKENS, 4)
    result = FlowWeighted().correspond(source, keys, window)
    assert torch.equal(result.gather(values)[:, 2], values[:, 1])


def test_what_stands_still_and_looks_alike_stays() -> None:
    keys = KEYS[:1].expand(KEYFRAMES, -1, -1)
    source = KEYS[:1] + 0.01 * SOURCE
    result = dense(FlowWeighted().correspond(source, keys, STILL))
    own = torch.arange(TOKENS)[None, :, None] + TOKENS * WINDOW.neighbours[:, None]
    expected = torch.where(WINDOW.blend == 0, 1.0, WINDOW.blend)  # the neighbour named twice
    # the similarities lost to the noise are of its square
    assert torch.allclose(
        result.gather(2, own), expected[:, None].expand(-1, TOKENS, -1), atol=1e-5
    )


@pytest.mark.parametrize(
    "hidden",
    [
        motion(0.0, 0.0).displacement + torch.tensor([100.0, 0.0]),
        motion(0.0, 0.0).displacement + torch.tensor([0.0, -100.0]),
    ],
)
def test_what_left_the_frame_falls_back_to_features(hidden: Tensor) -> None:
    window = dataclasses.replace(WINDOW, motion=Motion(hidden, torch.zeros(FRAMES, 2, TOKENS)))
    others = [0, 1, 3, 4]  # one frame is a keyframe
    expected = dense(NNField().correspond(SOURCE, KEYS, window))
    assert torch.equal(dense(found(window))[others], expected[others])


def test_what_is_occluded_falls_back_to_features() -> None:
    """A flow that does not come back is not followed, token by token."""
    here = motion(0.0, 0.0)
    here.inconsistency[:, :, ::2] = 5.0
    window = dataclasses.replace(WINDOW, motion=here)
    expected = dense(NNField().correspond(SOURCE, KEYS, window))
    result, others = dense(found(window, disagreement=1e3)), [0, 1, 3, 4]
    assert torch.equal(result[others, ::2], expected[others, ::2])
    followed = result[others, 1::2].gather(
        2,
        (torch.arange(TOKENS)[None, 1::2, None] + TOKENS * WINDOW.neighbours[others][:, None]),
    )
    assert torch.allclose(followed, WINDOW.blend[others][:, None].expand_as(followed), atol=1e-5)


def test_features_that_contradict_the_flow_are_followed() -> None:
    expected = dense(NNField().correspond(SOURCE, KEYS, STILL))
    others = [0, 1, 3, 4]  # one frame is a keyframe
    assert torch.allclose(dense(found(STILL, disagreement=1e-3))[others], expected[others])
    assert not torch.allclose(dense(found(STILL, disagreement=1e3))[others], expected[others])


def test_tokens_that_all_look_the_same_follow_the_flow() -> None:
    same = torch.ones(1, 1, CHANNELS)
    source, keys = same.expand(FRAMES, TOKENS, -1), same.expand(KEYFRAMES, TOKENS, -1)
    result = dense(FlowWeighted().correspond(source, keys, STILL))
    own = torch.arange(TOKENS)[None, :, None] + TOKENS * WINDOW.neighbours[:, None]
    # the same place in both neighbours; a keyframe's one neighbour is named twice
    weights = result.gather(2, own).sum(-1)[[0, 1, 3, 4]]
    assert torch.allclose(weights, torch.ones_like(weights), atol=1e-3)


def test_inputs_are_left_alone() -> None:
    before = [SOURCE.clone(), KEYS.clone(), WINDOW.motion.displacement.clone()]  # type: ignore
    found()
    assert torch.equal(SOURCE, before[0])
    assert torch.equal(KEYS, before[1])
    assert WINDOW.motion is not None
    assert torch.equal(WINDOW.motion.displacement, before[2])


def test_no_similarity_matrix_is_held() -> None:
    frames, side, channels, block = 8, 16, 2, 32
    count = side * side
    window = Window(
        frames=tuple(range(1, 9)),
        keyframes=(0, 9),
        neighbours=torch.tensor([[0, 1]] * frames),
        blend=torch.full((frames, 2), 0.5),
        height=side,
        width=side,
        motion=Motion(torch.randn(frames, 2, count, 2), torch.rand(frames, 2, count)),
    )
    source, keys = torch.randn(frames, count, channels), torch.randn(2, count, channels)
    with Largest() as largest:
        FlowWeighted(block=block).correspond(source, keys, window)
    # the result's ten taps; one frame's similarities alone would be three times that
    assert largest.elements == frames * count * 10 < count * count


def test_flow_is_by_dis_unless_told_otherwise() -> None:
    assert isinstance(FlowWeighted().flow, DIS)
    fast = DIS("fast")
    assert FlowWeighted(fast).flow is fast
    assert NNField().flow is None


def test_a_window_without_motion() -> None:
    window = dataclasses.replace(WINDOW, motion=None)
    with pytest.raises(InputError, match="FlowWeighted needs a window with motion, got one with"):
        found(window)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inconsistency": 0.0}, "inconsistency must be above 0, got 0.0"),
        ({"inconsistency": math.nan}, "inconsistency must be above 0, got nan"),
        ({"disagreement": -1.0}, "disagreement must be above 0, got -1.0"),
        ({"block": 0}, "block must be at least 1 token, got 0"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        FlowWeighted(**options)
