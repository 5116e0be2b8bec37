import pytest
import torch

from tests.metrics.making import noise, still, translation
from tests.propagation.flow.test_base import naive_warp
from tokenflow.metrics import warp_error


def test_against_a_naive_loop() -> None:
    frames, flow = noise(3, 3, 5, 7), 4 * noise(2, 2, 5, 7, seed=1) - 2
    visible = noise(2, 5, 7, seed=2) > 0.3
    total = count = 0.0
    for i in range(2):
        warped = naive_warp(frames[i + 1], flow[i])
        for y in range(5):
            for x in range(7):
                if visible[i, y, x]:
                    for c in range(3):
                        total += (float(warped[c, y, x]) - float(frames[i, c, y, x])) ** 2
                        count += 1
    assert warp_error(frames, flow, visible) == pytest.approx(total / count, abs=1e-6)


def test_a_static_clip_has_none() -> None:
    everywhere = torch.ones(3, 16, 20, dtype=torch.bool)
    # grid_sample's coordinates are rounded in float32
    assert warp_error(still(4), torch.zeros(3, 2, 16, 20), everywhere) < 1e-10


def test_a_pure_translation_has_none_and_noise_has_a_sixth() -> None:
    flow = torch.tensor([-2.0, 0.0])[None, :, None, None].expand(3, 2, 16, 20)
    visible = torch.ones(3, 16, 20, dtype=torch.bool)
    visible[..., :2] = False  # these leave the frame
    assert warp_error(translation(4), flow, visible) < 1e-10
    # the mean square of two uniform variables' difference; 2880 of them miss it by under 3 %
    assert warp_error(noise(4, 3, 16, 20), flow, visible) == pytest.approx(1 / 6, rel=0.1)


def test_visible_pixels_only_count() -> None:
    frames = torch.zeros(2, 3, 4, 4)
    frames[1, :, 0, 0] = 1
    visible = torch.ones(1, 4, 4, dtype=torch.bool)
    nowhere = torch.zeros(1, 2, 4, 4)
    assert warp_error(frames, nowhere, visible) == pytest.approx(1 / 16)
    visible[0, 0, 0] = False
    assert warp_error(frames, nowhere, visible) == 0
