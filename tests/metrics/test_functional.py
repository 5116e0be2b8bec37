import math

import pytest
import torch

from tokenflow.metrics import psnr, warp_error
from tokenflow.propagation.optical_flow import warp


def test_psnr_of_known_errors() -> None:
    zeros = torch.zeros(2, 3, 4, 4)
    assert psnr(zeros, zeros + 0.1) == pytest.approx(20, abs=1e-4)  # float32 of 0.1 squared
    assert math.isinf(psnr(zeros, zeros))


def test_warp_against_a_naive_loop() -> None:
    torch.manual_seed(0)
    frames, flow = torch.rand(2, 3, 5, 7), 3 * torch.randn(2, 2, 5, 7)
    expected = torch.empty_like(frames)
    for n in range(2):
        for y in range(5):
            for x in range(7):
                px = min(max(x + float(flow[n, 0, y, x]), 0), 6)
                py = min(max(y + float(flow[n, 1, y, x]), 0), 4)
                x0, y0 = min(int(px), 5), min(int(py), 3)
                fx, fy = px - x0, py - y0
                top = frames[n, :, y0, x0] * (1 - fx) + frames[n, :, y0, x0 + 1] * fx
                low = frames[n, :, y0 + 1, x0] * (1 - fx) + frames[n, :, y0 + 1, x0 + 1] * fx
                expected[n, :, y, x] = top * (1 - fy) + low * fy
    # float32 positions up to 7, differences of neighbours up to 1: 1e-5 is ten roundings
    torch.testing.assert_close(
        torch.stack(list(map(warp, frames, flow))), expected, atol=1e-5, rtol=0
    )


def test_warp_error_of_a_pure_translation_is_zero_and_of_noise_is_not() -> None:
    torch.manual_seed(0)
    wide = torch.rand(3, 8, 20)
    moving = torch.stack([wide[..., 2 * i : 2 * i + 10] for i in range(4)])
    flow = torch.tensor([-2.0, 0.0])[None, :, None, None].expand(3, 2, 8, 10)
    visible = torch.ones(3, 8, 10, dtype=torch.bool)
    visible[..., :2] = False  # these leave the frame
    # two float32 roundings of coordinates below 10
    assert warp_error(moving, flow, visible) < 1e-10
    # two independent uniform variables differ by 1/6 in the mean square, by less after sampling
    assert warp_error(torch.rand(4, 3, 8, 10), flow, visible) == pytest.approx(1 / 6, rel=0.15)


def test_warp_error_counts_visible_pixels_only() -> None:
    frames = torch.zeros(2, 3, 4, 4)
    frames[1, :, 0, 0] = 1
    visible = torch.ones(1, 4, 4, dtype=torch.bool)
    still = torch.zeros(1, 2, 4, 4)
    assert warp_error(frames, still, visible) == pytest.approx(1 / 16)
    visible[0, 0, 0] = False
    assert warp_error(frames, still, visible) == 0
