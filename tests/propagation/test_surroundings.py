"""Flow that is lost, from the flow around it."""

from __future__ import annotations

import pytest
import torch

from tokenflow.propagation.flow.surroundings import continued, filled

SHIFT = torch.tensor([3.0, -1.0])[:, None, None]


def moved() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noise of 24x32 pixels, where it has moved, and its flow, lost in a block of 6x6."""
    one = torch.randn(4, 24, 32, generator=torch.Generator().manual_seed(0))
    flow = torch.cat([SHIFT.expand(-1, 24, 32), torch.zeros(1, 24, 32)])
    flow[:, 8:14, 10:16] = torch.tensor([-2.0, 4.0, 5.0])[:, None, None]
    return one, one.roll((-1, 3), (1, 2)), flow


@pytest.mark.parametrize("inconsistent", [True, False])
def test_it_goes_on_where_that_fits_better(inconsistent: bool) -> None:
    one, other, flow = moved()
    if not inconsistent:  # the wrong way leads to something else
        flow[2] = 0
    found = continued(one, other, flow)
    torch.testing.assert_close(found, SHIFT.expand(-1, 24, 32))


def test_it_stays_where_that_fits_worse() -> None:
    one, other, flow = moved()
    other = other.clone()
    other[:, 7:13, 13:19] = other[:, 7:13, 19:25]
    other[:, 12:18, 8:14] = one[:, 8:14, 10:16]  # moves by itself, to where flow says
    found = continued(one, other, flow)
    # all but the block's border, whose neighbours belong to something else
    assert torch.equal(found[:, 9:13, 11:15], flow[:2, 9:13, 11:15])


def test_nothing_is_known() -> None:
    one, other, flow = moved()
    flow[2] = 9
    assert torch.equal(continued(one, other, flow), flow[:2])


@pytest.mark.parametrize("size", [(5, 7), (1, 9), (16, 16), (33, 1)])
def test_one_known_value_fills_all(size: tuple[int, int]) -> None:
    known = torch.zeros(size, dtype=torch.bool)
    known[-1, 0] = True
    values = torch.full((2, *size), 99.0)
    values[:, -1, 0] = 3
    torch.testing.assert_close(filled(values, known), torch.full((2, *size), 3.0))


def test_known_values_stay_and_others_lie_between() -> None:
    values = torch.linspace(0, 1, 16).expand(1, 8, -1).clone()
    known = torch.ones(8, 16, dtype=torch.bool)
    known[2:6, 5:11] = False
    values[:, ~known] = 50
    found = filled(values, known)
    assert torch.equal(found[:, known], values[:, known])
    assert ((found > 0.2) & (found < 0.8))[:, ~known].all()
