import dataclasses

import pytest
import torch

from tokenflow.diffusion import Schedule, Trajectory

SCHEDULE = Schedule((801, 401, 1), (0.3, 0.6, 0.9, 1.0), (0.9, 0.8, 0.4, 0.0))
LATENTS = torch.randn(3, 5, 4, 2, 2)
CLEAN = torch.randn(5, 4, 2, 2)
WHOLE = Trajectory(SCHEDULE.timesteps, LATENTS, CLEAN, LATENTS[0] + 1, 0.1, 0.995)
PART = Trajectory(
    SCHEDULE.timesteps, LATENTS[:, 2:4], CLEAN[2:4], LATENTS[0, 2:4] + 1, 0.1, 0.995, 2, 5
)
"""The frames 2 and 3 of the clip of five, as a rank has them."""


def test_latents_by_level_and_frame() -> None:
    assert len(WHOLE) == WHOLE.total == 5
    assert WHOLE.positions == range(5)
    assert WHOLE.size == (2, 2)
    for level in range(3):
        assert torch.equal(WHOLE.at(level), LATENTS[level])
    assert torch.equal(WHOLE.at(3), CLEAN)
    assert torch.equal(WHOLE.at(1, [4, 0]), LATENTS[1][[4, 0]])


@pytest.mark.parametrize("level", [4, 99])
def test_there_is_no_level_beyond_the_clean_one(level: int) -> None:
    with pytest.raises(IndexError, match=f"no latents at level {level}: there is none"):
        WHOLE.at(level)


def test_without_inversion_there_is_the_clean_level_alone() -> None:
    trajectory = Trajectory.empty(CLEAN, SCHEDULE, None)
    assert torch.equal(trajectory.at(3), CLEAN)
    with pytest.raises(IndexError, match="no latents at level 0: the source was not inverted"):
        trajectory.at(0)


def test_frames_are_given_by_their_positions_in_the_clip() -> None:
    assert (PART.positions, len(PART), PART.total) == (range(2, 4), 2, 5)
    assert torch.equal(PART.at(1, [3]), LATENTS[1, 3:4])
    assert torch.equal(PART.at(3, [3, 2]), CLEAN[[3, 2]])
    with pytest.raises(IndexError, match=r"frame 1 of the clip is not among those here, 2 to 3; "):
        PART.at(1, [1])


def test_a_source_has_some_frames_at_all_levels() -> None:
    source = PART.source([3])
    assert (source.frames, len(source)) == ((3,), 1)
    assert torch.equal(source.clean, CLEAN[3:4])
    assert torch.equal(source.at(0), LATENTS[0, 3:4])
    assert torch.equal(source.at(3), source.clean)
    assert PART.source().frames == (2, 3)


def test_the_noise_is_that_of_the_noisiest_latents() -> None:
    noise = torch.randn(5, 4, 2, 2)
    trajectory = dataclasses.replace(WHOLE, noisiest=0.1 * CLEAN + 0.995 * noise)
    # float32's 1e-7 of a few
    assert torch.allclose(trajectory.source([1, 4]).noise, noise[[1, 4]], rtol=0, atol=1e-6)


def test_latents_are_filled_in_by_timestep() -> None:
    inversion = Schedule((901, 801, 401, 1), (0.1, 0.3, 0.6, 0.9, 1.0), (0.995, 0.9, 0.8, 0.4, 0.0))
    trajectory, here = Trajectory.empty(CLEAN, SCHEDULE, inversion), torch.tensor([3, 1])
    for i, t in reversed(list(enumerate(inversion.timesteps))):
        trajectory.keep(t, here, torch.full((2, 4, 2, 2), float(i)))
    for level in range(3):
        assert (trajectory.at(level, [1, 3]) == level + 1).all()
    # beyond sampling's first level
    assert not trajectory.noisiest[here].any()
    assert (trajectory.noisiest_signal, trajectory.noisiest_noise) == (0.1, 0.995)
