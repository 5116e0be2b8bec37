import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tokenflow.errors import PluginError
from tokenflow.propagation import Correspondence, check_correspondence
from tokenflow.propagation.kernel_contract import violations

SOURCE, KEYS = torch.rand(2, 6, 4), torch.rand(3, 6, 4)


def weights(*row: float) -> Tensor:
    return torch.tensor(row).expand(2, 6, -1)


def indices(*row: int) -> Tensor:
    return torch.tensor(row).expand(2, 6, -1)


def check(found: Any) -> None:
    check_correspondence(found, SOURCE, KEYS, "Kernel at site")


@pytest.mark.parametrize(
    "found",
    [
        Correspondence(indices(0, 17), weights(0.25, 0.75)),
        Correspondence(indices(5).int(), weights(1.0).half()),
        Correspondence(indices(1, 2, 3), weights(0.3334, 0.3334, 0.3334)),
    ],
)
def test_a_row_stochastic_matrix_passes(found: Correspondence) -> None:
    check(found)


HALVES = weights(0.5, 0.5)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (None, "expected a Correspondence, got NoneType"),
        (
            Correspondence(indices(0, 1)[:1], HALVES[:1]),
            r"expected indices of shape \(2, 6, taps\), got \(1, 6, 2\)",
        ),
        (
            Correspondence(indices(0)[:, :, :0], HALVES[:, :, :0]),
            r"expected indices of shape \(2, 6, taps\), got \(2, 6, 0\)",
        ),
        (Correspondence(indices(0, 18), HALVES), "expected indices from 0 to 17 .*, got 0 to 18"),
        (Correspondence(indices(-1, 0), HALVES), "expected indices from 0 to 17 .*, got -1 to 0"),
        (Correspondence(indices(0, 1).short(), HALVES), "of dtype int64, got torch.int16"),
        (Correspondence(indices(0, 1), weights(1.5, -0.5)), "weights of 0 or more, got -0.5"),
        (Correspondence(indices(0, 1), weights(0.5, 0.502)), "sum to 1, got sums from 1.002 to"),
        (Correspondence(indices(0, 1), weights(0.5, 0.25)), "sum to 1, got sums from 0.75 to 0.75"),
        (Correspondence(indices(0, 1), weights(math.nan, 0.5)), "weights of 0 or more, got nan"),
        (
            Correspondence(indices(0, 1).to("meta"), HALVES.to("meta")),
            "expected indices on cpu, as the tokens are, got meta",
        ),
    ],
)
def test_anything_else_is_refused(found: Any, message: str) -> None:
    with pytest.raises(PluginError, match=f"Kernel at site: .*{message}"):
        check(found)


def test_arrays_are_no_tensors() -> None:
    found = Correspondence(indices(0, 1), HALVES)
    object.__setattr__(found, "weights", HALVES.numpy())  # past the type checker of the tests
    with pytest.raises(
        PluginError, match=r"expected weights in a tensor, got ndarray; .* convert them"
    ):
        check(found)


def test_all_that_is_wrong_with_the_numbers_is_found() -> None:
    found = Correspondence(indices(0, 18), weights(1.5, -0.4))
    assert [v.rule for v in violations(found, SOURCE, KEYS)] == ["range", "sign", "rows"]


@pytest.mark.parametrize(("frame", "token"), [(0, 0), (1, 5)])
def test_one_wrong_row_is_enough(frame: int, token: int) -> None:
    wrong = HALVES.clone()
    wrong[frame, token, 0] = 0.4
    with pytest.raises(PluginError, match=r"got sums from 0\.9 to 1;"):
        check(Correspondence(indices(0, 1), wrong))
