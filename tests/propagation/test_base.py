import itertools

import pytest
import torch
from torch import Tensor

from tokenflow.propagation import Correspondence, Propagation

from .measuring import Largest

BRANCHES, FRAMES, KEYFRAMES, TOKENS, CHANNELS = 3, 4, 2, 6, 5


def random_correspondence(taps: int) -> Correspondence:
    indices = torch.randint(KEYFRAMES * TOKENS, (FRAMES, TOKENS, taps))
    return Correspondence(indices, torch.rand(FRAMES, TOKENS, taps).softmax(-1))


def naive_gather(correspondence: Correspondence, values: Tensor) -> Tensor:
    result = torch.zeros(BRANCHES, FRAMES, TOKENS, CHANNELS, dtype=torch.float64)
    taps = correspondence.indices.shape[-1]
    for b, f, s, k in itertools.product(range(BRANCHES), range(FRAMES), range(TOKENS), range(taps)):
        keyframe, token = divmod(int(correspondence.indices[f, s, k]), TOKENS)
        weight = correspondence.weights[f, s, k].double()
        result[b, f, s] += weight * values[b, keyframe, token].double()
    return result


@pytest.mark.parametrize("taps", [1, 2, 8])
def test_gather_agrees_with_a_naive_loop(taps: int) -> None:
    torch.manual_seed(taps)
    correspondence = random_correspondence(taps)
    values = torch.randn(BRANCHES, KEYFRAMES, TOKENS, CHANNELS)
    gathered = correspondence.gather(values)
    assert gathered.dtype == torch.float32
    # eight float32 products of numbers below 5, whose weights sum to 1
    expected = naive_gather(correspondence, values)
    assert torch.allclose(gathered.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gather_keeps_the_values_dtype(dtype: torch.dtype) -> None:
    values = torch.randn(BRANCHES, KEYFRAMES, TOKENS, CHANNELS).to(dtype)
    assert random_correspondence(2).gather(values).dtype == dtype


def test_gather_leaves_the_values_alone() -> None:
    values = torch.randn(BRANCHES, KEYFRAMES, TOKENS, CHANNELS)
    before = values.clone()
    random_correspondence(2).gather(values)
    assert torch.equal(values, before)


def test_gather_holds_one_tap_at_a_time() -> None:
    with Largest() as largest:
        random_correspondence(8).gather(torch.randn(BRANCHES, KEYFRAMES, TOKENS, CHANNELS))
    assert largest.elements == BRANCHES * FRAMES * TOKENS * CHANNELS


def test_gather_needs_a_tap() -> None:
    with pytest.raises(ValueError, match="at least one tap"):
        random_correspondence(0).gather(torch.randn(BRANCHES, KEYFRAMES, TOKENS, CHANNELS))


def test_a_kernel_must_say_where_tokens_correspond() -> None:
    class Nothing(Propagation):
        pass

    with pytest.raises(TypeError, match="correspond"):
        Nothing()  # type: ignore[abstract]
