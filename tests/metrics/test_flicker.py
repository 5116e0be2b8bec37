import math

import pytest
import torch

from tests.metrics.making import noise, still
from tokenflow.metrics import flicker


def test_a_static_clip_has_none() -> None:
    assert flicker(still(8)) == 0


@pytest.mark.parametrize("frames", [8, 65])
def test_independent_noise_has_the_share_of_its_spectrum(frames: int) -> None:
    clip = noise(frames, 3, 40, 40)
    # white noise's differences have the power 4 sin²(πω) at every frequency ω on average
    count = frames - 1
    grid = [k / count for k in range(count)]
    power = [4 * math.sin(math.pi * w) ** 2 for w in grid]
    share = sum(p for p, w in zip(power, grid, strict=True) if min(w, 1 - w) > 0.25) / sum(power)
    # of a finite clip, the ends smear power between frequencies
    assert flicker(clip) == pytest.approx(share, abs=0.06)
    if frames == 65:
        assert flicker(clip) == pytest.approx((math.pi + 2) / (2 * math.pi), abs=0.02)


@pytest.mark.parametrize(("period", "share"), [(32, 0), (8, 0), (2.5, 1)])
def test_a_travelling_wave_is_as_quick_as_its_period(period: float, share: int) -> None:
    """A pure translation: 40 differences of a sine, whole numbers of periods of 8 and 2.5."""
    count = 64 if period == 32 else 40
    t, x = torch.arange(count + 1)[:, None, None, None], torch.arange(20)
    wave = 0.5 + 0.4 * torch.sin(2 * math.pi * (x + t) / period)
    # half a level's power is taken for none: 4e-6 of 0.08 (1 - cos(2π / period)), at least 0.0016
    assert flicker(wave.expand(-1, 3, 4, -1)) == pytest.approx(share, abs=0.003)


@pytest.mark.parametrize("frames", [1, 3])
def test_of_few_frames_none_can_be_told(frames: int) -> None:
    with pytest.raises(ValueError, match=f"expected 4 frames or more, got {frames}"):
        flicker(noise(frames, 3, 4, 4))


def test_what_nobody_sees_hardly_counts() -> None:
    faint = 0.5 + 0.2 * (noise(16, 3, 16, 16) - 0.5) / 255
    assert flicker(faint) < 0.05
    assert flicker(0.5 + 20 * (faint - 0.5)) > 0.6
