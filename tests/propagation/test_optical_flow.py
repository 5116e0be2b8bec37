import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from tokenflow.errors import InputError
from tokenflow.propagation import DIS, OpticalFlow
from tokenflow.propagation.optical_flow import require_flow, warp
from tokenflow.video import Clip


def translating(shift: tuple[int, int], size: int = 96) -> Clip:
    """Two views of one smooth texture: what the first shows at p, the second shows at p + shift."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(1, 3, 16, 16, generator=generator)
    x, y = shift
    texture = interpolate(noise, (size + 32, size + 32), mode="bicubic")[0].clamp(0, 1)
    views = [
        texture[:, 16 - v : 16 - v + size, 16 - u : 16 - u + size] for u, v in ((0, 0), (x, y))
    ]
    return Clip.from_frames(torch.stack(views))


@pytest.mark.parametrize("preset", ["ultrafast", "fast", "medium"])
@pytest.mark.parametrize("shift", [(0, 0), (5, -3), (-8, 6)])
def test_dis_finds_a_translation(preset: Any, shift: tuple[int, int]) -> None:
    flow = DIS(preset).between(translating(shift), 0, 1)
    assert flow.shape == (2, 96, 96)
    assert flow.dtype == torch.float32
    error = (flow - torch.tensor(shift)[:, None, None]).norm(dim=0)[16:-16, 16:-16]
    # pixels, away from the border, beyond which part of the texture has left
    assert error.mean() < 0.2


def test_dis_goes_from_start_to_end() -> None:
    clip = translating((5, -3))
    back = DIS().between(clip, 1, 0)[:, 16:-16, 16:-16].mean(dim=(1, 2))
    assert torch.allclose(back, torch.tensor([-5.0, 3.0]), atol=0.1)


def test_dis_needs_twelve_pixels() -> None:
    DIS().prepare(Clip.from_frames(torch.rand(2, 3, 12, 12)))
    with pytest.raises(InputError, match=r"12x12 pixels or more, got 8x64; raise the resolution"):
        DIS().prepare(Clip.from_frames(torch.rand(2, 3, 8, 64)))


def test_dis_works_on_the_smallest_frames() -> None:
    flow = DIS().between(Clip.from_frames(torch.rand(2, 3, 12, 12)), 0, 1)
    assert flow.isfinite().all()


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
