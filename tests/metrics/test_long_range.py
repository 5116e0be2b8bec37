import pytest
import torch
from torch import Tensor

from tests.metrics.making import noise, still, translation
from tokenflow.metrics import VisibleFlow, long_range, visible_flow
from tokenflow.propagation import ClipFlow, OpticalFlow
from tokenflow.video import Clip


class Constant(OpticalFlow):
    """The same motion everywhere, in pixels to the right for each frame."""

    def __init__(self, step: float) -> None:
        self.step = step

    def between(self, clip: Clip, start: int, end: int) -> Tensor:
        flow = torch.zeros(2, *clip.frames.shape[-2:])
        flow[0] = self.step * (end - start)
        return flow


def flow_of(frames: Tensor, step: float) -> VisibleFlow:
    return visible_flow(ClipFlow(Clip.from_frames(frames), Constant(step)))


def consistency(frames: Tensor, step: float, distance: int) -> tuple[float, float]:
    found = long_range(frames, flow_of(frames, step), distance)
    assert found is not None
    return found


@pytest.mark.parametrize("distance", [1, 3])
def test_of_known_clips(distance: int) -> None:
    assert consistency(still(5), 0, distance) == pytest.approx((0, 1), abs=1e-10)
    share = 1 - 2 * distance / 20  # the rest leaves the frame
    assert consistency(translation(5), -2, distance) == pytest.approx((0, share), abs=1e-10)
    error, seen = consistency(noise(5, 3, 16, 20), 0, distance)
    assert error == pytest.approx(1 / 6, rel=0.1)
    assert seen == 1


def test_a_slow_drift_shows_at_a_distance() -> None:
    """Brightness grows by a hundredth each frame: (d / 100)² at distance d."""
    frames = 0.5 + torch.arange(9)[:, None, None, None].expand(9, 3, 16, 16) / 100
    for distance in (1, 8):
        error, _ = consistency(frames, 0, distance)
        assert error == pytest.approx((distance / 100) ** 2, rel=1e-4)


def test_a_short_clip_has_none_and_one_of_nothing_visible_has_no_number() -> None:
    assert long_range(still(3), flow_of(still(3), 0), 3) is None
    error, seen = consistency(still(3), 100, 1)
    assert error != error
    assert seen == 0
