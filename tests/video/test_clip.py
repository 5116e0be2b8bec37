from fractions import Fraction

import pytest
import torch

from tokenflow.video import Clip, VideoError


def test_from_frames_spaces_frames_evenly_and_shows_them_at_their_size():
    clip = Clip.from_frames(torch.rand(3, 3, 10, 14), rate=Fraction(30_000, 1001))
    assert len(clip) == 3
    assert clip.times == (0, Fraction(1001, 30_000), Fraction(2002, 30_000))
    assert clip.display_size == (10, 14)
    assert clip.audio is None


@pytest.mark.parametrize(
    ("count", "times", "rate", "message"),
    [
        (0, (), 8, "no frames"),
        (2, (0,), 8, "one time for each of 2 frames, got 1"),
        (2, (0, 0), 8, "increase"),
        (3, (0, 2, 1), 8, "up to frame 2"),
        (2, (1, 2), 8, "start at 0"),
        (2, (-1, 2), 8, "not negative"),
        (2, (0, 1), 0, "rate greater than 0"),
    ],
)
def test_a_clip_that_does_not_fit_together_is_refused(count, times, rate, message):
    times = tuple(Fraction(time) for time in times)
    with pytest.raises(VideoError, match=message):
        Clip(torch.rand(count, 3, 4, 4), times, Fraction(rate), "clip", (4, 4))


def test_from_frames_refuses_8_bit_levels():
    with pytest.raises(VideoError, match=r"expected colours from 0 to 1, got 255 .* divide"):
        Clip.from_frames(torch.full((2, 3, 4, 4), 255.0))


def test_from_frames_refuses_a_rate_of_zero():
    with pytest.raises(VideoError, match="rate greater than 0"):
        Clip.from_frames(torch.rand(1, 3, 4, 4), rate=Fraction(0))
