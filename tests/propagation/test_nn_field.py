import itertools
import math

import pytest
import torch
from torch import Tensor

from tokenflow.errors import InputError
from tokenflow.propagation import Correspondence, NNField, Window

from .measuring import Largest

FRAMES, KEYFRAMES, TOKENS, CHANNELS = 5, 3, 24, 6
WINDOW = Window(
    frames=(3, 4, 5, 6, 7),
    keyframes=(1, 5, 9),
    neighbours=torch.tensor([[0, 1], [0, 1], [1, 1], [1, 2], [1, 2]]),
    blend=torch.tensor([[0.6, 0.4], [0.3, 0.7], [1.0, 0.0], [0.5, 0.5], [0.25, 0.75]]),
)


def tokens(frames: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(frames, TOKENS, CHANNELS, generator=generator).to(dtype)


def found(block: int = 2048, dtype: torch.dtype = torch.float32) -> Correspondence:
    return NNField(block).correspond(tokens(FRAMES, 0, dtype), tokens(KEYFRAMES, 1, dtype), WINDOW)


def naive_nearest(token: list[float], keys: list[list[float]]) -> int:
    def cosine(key: list[float]) -> float:
        dot = sum(a * b for a, b in zip(token, key, strict=True))
        return dot / (math.hypot(*token) * math.hypot(*key))

    return max(range(len(keys)), key=lambda i: cosine(keys[i]))


def naive_propagation(source: Tensor, keys: Tensor, window: Window, values: Tensor) -> Tensor:
    """Equations 5 and 6, one token, one neighbour and one branch at a time, in float64."""
    result = torch.zeros(len(values), *source.shape[:2], values.shape[-1], dtype=torch.float64)
    for frame, token in itertools.product(range(source.shape[0]), range(source.shape[1])):
        for k, weight in zip(window.neighbours[frame], window.blend[frame], strict=True):
            at = naive_nearest(source[frame, token].tolist(), keys[k].tolist())
            for branch in range(len(values)):
                result[branch, frame, token] += weight.double() * values[branch, k, at].double()
    return result


@pytest.mark.parametrize("block", [7, 24, 2048])
def test_agrees_with_a_naive_loop(block: int) -> None:
    values = torch.randn(3, KEYFRAMES, TOKENS, 4)
    expected = naive_propagation(tokens(FRAMES, 0), tokens(KEYFRAMES, 1), WINDOW, values)
    # float32 rounds the sum of two products of numbers below 5 by less than 1e-6
    assert torch.allclose(found(block).gather(values).double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("block", [1, 5, 8, TOKENS, TOKENS * FRAMES - 1, TOKENS * FRAMES])
def test_block_changes_nothing(block: int) -> None:
    assert torch.equal(found(block).indices, found().indices)


def test_a_block_needs_a_token() -> None:
    with pytest.raises(InputError, match="block must be at least 1 token, got 0"):
        NNField(block=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_matched_in_float32(dtype: torch.dtype) -> None:
    source, keys = tokens(FRAMES, 0, dtype), tokens(KEYFRAMES, 1, dtype)
    # keys a little apart, whose similarities would be ties in half precision
    keys = keys[:, :1] + 0.05 * keys
    half = NNField().correspond(source, keys, WINDOW)
    full = NNField().correspond(source.float(), keys.float(), WINDOW)
    assert torch.equal(half.indices, full.indices)
    unit = torch.nn.functional.normalize(keys[0], dim=-1)
    rough = (source[0] @ unit.T).max(dim=1).indices
    assert not torch.equal(rough, full.indices[0, :, 0]), "the keys do not tell the two apart"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1000.0])
def test_is_a_sparse_row_stochastic_matrix(dtype: torch.dtype, scale: float) -> None:
    source, keys = tokens(FRAMES, 0) * scale, tokens(KEYFRAMES, 1)
    result = NNField().correspond(source.to(dtype), keys.to(dtype), WINDOW)
    assert result.indices.shape == result.weights.shape == (FRAMES, TOKENS, 2)
    assert result.indices.dtype == torch.long
    assert result.weights.dtype == torch.float32
    assert result.indices.device == result.weights.device == source.device
    assert torch.equal(result.indices // TOKENS, WINDOW.neighbours[:, None].expand(-1, TOKENS, -1))
    assert (result.weights >= 0).all()
    # two float32 numbers below 1
    assert torch.allclose(result.weights.sum(-1), torch.ones(FRAMES, TOKENS), rtol=0, atol=1e-6)


def test_a_keyframe_finds_itself() -> None:
    keys = tokens(KEYFRAMES, 1)
    source = tokens(FRAMES, 0)
    source[2] = keys[1]
    values = torch.randn(2, KEYFRAMES, TOKENS, 4)
    result = NNField().correspond(source, keys, WINDOW)
    assert torch.equal(result.indices[2, :, 0], TOKENS + torch.arange(TOKENS))
    assert torch.equal(result.gather(values)[:, 2], values[:, 1])


def test_scale_of_a_token_does_not_matter() -> None:
    source, keys = tokens(FRAMES, 0), tokens(KEYFRAMES, 1)
    scales = torch.logspace(-3, 3, TOKENS)[:, None]
    result = NNField().correspond(source * scales, keys * scales.flip(0), WINDOW)
    assert torch.equal(result.indices, found().indices)


def test_no_similarity_matrix_is_held() -> None:
    frames, count, channels, block = 8, 256, 2, 32
    source, keys = torch.randn(frames, count, channels), torch.randn(2, count, channels)
    window = Window(
        frames=tuple(range(1, 9)),
        keyframes=(0, 9),
        neighbours=torch.tensor([[0, 1]] * frames),
        blend=torch.full((frames, 2), 0.5),
    )
    with Largest() as largest:
        NNField(block).correspond(source, keys, window)
    # one block's similarities; one frame's alone would be eight times that
    assert largest.elements == block * count
