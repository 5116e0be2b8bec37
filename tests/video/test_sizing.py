from fractions import Fraction

import pytest
import torch

from tokenflow.video.sizing import framing, nearest, resized


@pytest.mark.parametrize(
    ("value", "multiple", "expected"),
    [(130, 64, 128), (160, 64, 192), (159, 64, 128), (5, 64, 64), (127, 2, 128), (7, 1, 7)],
)
def test_nearest(value, multiple, expected):
    assert nearest(value, multiple) == expected


@pytest.mark.parametrize(
    ("size", "aspect", "resolution", "multiple", "working", "display"),
    [
        ((130, 128), 1, None, 1, (130, 128), (130, 128)),
        ((130, 128), 1, None, 64, (128, 128), (130, 128)),
        ((1080, 1920), 1, 512, 64, (512, 896), (512, 910)),
        ((1920, 1080), 1, 512, 64, (896, 512), (910, 512)),
        ((576, 720), Fraction(64, 45), None, 8, (576, 1024), (576, 1024)),  # PAL, 16:9
        ((48, 64), 2, 24, 8, (24, 64), (24, 64)),
        ((33, 47), 1, None, 1, (33, 47), (34, 48)),
    ],
)
def test_framing_by_resizing(size, aspect, resolution, multiple, working, display):
    plan = framing(size, Fraction(aspect), resolution, "resize", multiple)
    assert (plan.scaled, plan.working, plan.display) == (working, working, display)


@pytest.mark.parametrize(
    ("size", "resolution", "multiple", "scaled", "working"),
    [
        ((130, 128), None, 64, (130, 128), (128, 128)),
        ((1080, 1920), 512, 64, (512, 910), (512, 896)),
        ((100, 125), None, 64, (128, 160), (128, 128)),
    ],
)
def test_framing_by_cropping_covers_the_working_size(size, resolution, multiple, scaled, working):
    plan = framing(size, Fraction(1), resolution, "crop", multiple)
    assert (plan.scaled, plan.working, plan.display) == (scaled, working, working)


def test_cropping_takes_the_middle_without_scaling():
    image = torch.rand(3, 130, 128)
    plan = framing((130, 128), Fraction(1), None, "crop", 64)
    assert torch.equal(plan.apply(image), image[:, 1:129])


def test_resizing_is_antialiased_and_stays_within_0_and_1():
    stripes = (torch.arange(64) % 4 == 1).float().expand(3, 64, 64)
    # Stripes finer than the new pixels must average out, except where the filter is cut off at
    # the ends; picking pixels would give 0.56.
    smaller = resized(stripes, (16, 16))[:, :, 2:-2]
    assert torch.allclose(smaller, torch.tensor(0.25), atol=1e-5)
    edge = (torch.arange(8) > 3).float().expand(3, 8, 8)
    larger = resized(edge, (32, 32))
    assert larger.min() == 0
    assert larger.max() == 1
