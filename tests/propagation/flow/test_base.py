import math

import pytest
import torch
from torch import Tensor

from tokenflow.errors import InputError
from tokenflow.propagation import OpticalFlow, warp
from tokenflow.propagation.flow.base import require_flow
from tokenflow.video import Clip


def test_an_optical_flow_must_say_how_it_goes() -> None:
    class Nothing(OpticalFlow):
        pass

    with pytest.raises(TypeError, match="between"):
        Nothing()  # type: ignore[abstract]


def naive_warp(values: Tensor, flow: Tensor) -> Tensor:
    """One pixel at a time, in Python's floats."""
    height, width = values.shape[1:]
    result = torch.zeros(values.shape, dtype=torch.float64)
    for y in range(height):
        for x in range(width):
            u = min(max(x + float(flow[0, y, x]), 0), width - 1)
            v = min(max(y + float(flow[1, y, x]), 0), height - 1)
            left, top = math.floor(u), math.floor(v)
            for row, column in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
                share = (1 - abs(u - column)) * (1 - abs(v - row))
                if share > 0:
                    result[:, y, x] += share * values[:, row, column].double()
    return result


@pytest.mark.parametrize("size", [(5, 7), (1, 4), (1, 1)])
def test_warp_agrees_with_a_naive_loop(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    values, flow = torch.randn(3, *size), 3 * torch.randn(2, *size)
    # float32: positions to 1e-6, times values below 5
    assert torch.allclose(warp(values, flow).double(), naive_warp(values, flow), atol=2e-5)


def test_flow_is_checked() -> None:
    clip = Clip.from_frames(torch.rand(2, 3, 8, 6))
    require_flow(torch.zeros(2, 8, 6), clip, "it")
    with pytest.raises(
        InputError, match=r"it is a flow of shape \(2, 6, 8\), expected \(2, 8, 6\)"
    ):
        require_flow(torch.zeros(2, 6, 8), clip, "it")
    for bad in (math.nan, math.inf):
        flow = torch.zeros(2, 8, 6)
        flow[:, 1, 2] = bad
        with pytest.raises(InputError, match=r"it has NaN or infinite values in 1 of 48 pixels"):
            require_flow(flow, clip, "it")
