import inspect
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler

from tokenflow.diffusion import Backbone, Schedule, StableDiffusion, Trajectory
from tokenflow.editors import Prompts, SDEdit
from tokenflow.editors.sdedit import check_strength, frame_noise, steps_to_run
from tokenflow.engine import Settings, edit_clip
from tokenflow.errors import InputError
from tokenflow.propagation import NNField
from tokenflow.video import Clip


def trajectory(schedule: Schedule, frames: int = 3) -> Trajectory:
    """Random latents."""
    generator = torch.Generator().manual_seed(0)
    steps = len(schedule.timesteps)
    latents = torch.randn(steps + 1, frames, 4, 8, 8, generator=generator)
    return Trajectory(schedule.timesteps, latents[:-1], latents[-1], latents[0])


@pytest.mark.parametrize(
    ("strength", "steps", "expected"),
    [
        *((1.0, 1, 1), (0.5, 1, 1), (1e-9, 1, 1), (1e-9, 50, 1), (0.009, 50, 1), (0.011, 50, 1)),
        *((0.03, 50, 2), (0.5, 50, 25), (0.9, 50, 45), (0.99, 50, 50), (0.98, 50, 49)),
        *((1.0, 50, 50), (0.5, 5, 3), (0.5, 7, 4), (0.25, 2, 1), (0.75, 2, 2)),
        # as they are written these are halves, and floating point falls below them
        *((0.145, 100, 15), (0.285, 100, 29), (0.575, 100, 58), (0.35, 90, 32), (0.7, 15, 11)),
    ],
)
def test_the_last_of_the_steps_run(
    backbone: Backbone, strength: float, steps: int, expected: int
) -> None:
    schedule = backbone.schedule(steps)
    start = SDEdit(strength).start(trajectory(schedule).source(), schedule, 0)
    assert steps - start.step == expected


def test_every_share_of_every_number_of_steps_is_that_many_steps() -> None:
    wrong = [(i, n) for n in range(1, 201) for i in range(1, n + 1) if steps_to_run(i / n, n) != i]
    assert wrong == []


@pytest.mark.parametrize("strength", [0.1, 0.4, 1.0])
def test_inverted_is_the_trajectory_where_it_starts(backbone: Backbone, strength: float) -> None:
    schedule = backbone.schedule(10)
    whole = trajectory(schedule)
    start = SDEdit(strength, "inverted").start(whole.source([2, 1]), schedule, 0)
    assert start.step == 10 - round(10 * strength)
    assert torch.equal(start.latents, whole.latents[start.step, [2, 1]])


def test_true_is_no_strength() -> None:
    unchecked = inspect.unwrap(check_strength)  # without the types that only the tests check
    with pytest.raises(InputError, match="strength is the share of the steps"):
        unchecked(True)


@pytest.mark.parametrize("noise", ["shared", "independent"])
@pytest.mark.parametrize("strength", [0.1, 0.5, 1.0])
def test_fresh_noise_is_added_as_the_scheduler_does(
    backbone: StableDiffusion, noise: str, strength: float
) -> None:
    schedule = backbone.schedule(10)
    source = trajectory(schedule).source()
    start = SDEdit(strength, noise).start(source, schedule, 5)
    frames = range(3) if noise == "independent" else [0, 0, 0]
    drawn = [frame_noise(5, frame, torch.Size((4, 8, 8))) for frame in frames]
    scheduler = backbone.scheduler
    assert isinstance(scheduler, DDIMScheduler)
    t = torch.tensor([int(schedule.timesteps[start.step])] * 3)
    expected = scheduler.add_noise(source.clean, torch.stack(drawn), t)
    # the same formula with float32 instead of float64 factors
    assert torch.allclose(start.latents, expected, rtol=0, atol=1e-5)


def noises(backbone: Backbone, noise: str, seed: int, frames: range) -> torch.Tensor:
    """The noise in first latents of these frames, of a source that is zero."""
    schedule = backbone.schedule(4)
    zero = torch.zeros(4, len(frames), 4, 8, 8)
    own = Trajectory(schedule.timesteps, zero, zero[0], zero[0], first=frames.start, whole=9)
    return SDEdit(1.0, noise).start(own.source(), schedule, seed).latents


def test_shared_noise_is_one_and_independent_noise_is_each_frames_own(backbone: Backbone) -> None:
    shared, own = (noises(backbone, noise, 0, range(4)) for noise in ("shared", "independent"))
    assert all(torch.equal(frame, shared[0]) for frame in shared)
    assert len({float(frame.sum()) for frame in own}) == 4


@pytest.mark.parametrize("noise", ["shared", "independent"])
def test_noise_comes_from_seed_and_frame_alone(backbone: Backbone, noise: str) -> None:
    long, short = (noises(backbone, noise, 7, frames) for frames in (range(5), range(3, 5)))
    torch.manual_seed(123)
    assert torch.equal(long[3:], short)
    assert torch.equal(long, noises(backbone, noise, 7, range(5)))
    assert not torch.allclose(long, noises(backbone, noise, 8, range(5)))


def test_noise_is_gaussian() -> None:
    many = torch.stack([frame_noise(0, i, torch.Size((4, 8, 8))) for i in range(100)])
    # 25,600 numbers: five standard errors of mean and standard deviation
    assert abs(float(many.mean())) < 5 / 160
    assert abs(float(many.std()) - 1) < 5 / (160 * 2**0.5)


def test_nothing_is_injected(backbone: Backbone) -> None:
    editor = SDEdit()
    assert list(editor.injections(backbone)) == []
    assert editor.cross_attention(backbone) == {}
    assert not editor.conditions_source
    assert not editor.sees_other_frames


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": 0.0}, r"strength .* above 0 and up to 1, got 0\.0"),
        ({"strength": -0.5}, r"got -0\.5"),
        ({"strength": 1.01}, r"strength .* got 1\.01"),
        ({"strength": float("nan")}, "strength .* got nan"),
        ({"noise": "fresh"}, "noise must be one of inverted, shared, independent, got 'fresh'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SDEdit(**options)


@pytest.mark.parametrize("noise", ["inverted", "shared", "independent"])
def test_edits_a_clip(backbone: Backbone, clip: Clip, noise: str) -> None:
    stages: list[tuple[str, int, int]] = []
    result = edit_clip(
        backbone,
        clip,
        Prompts("a blue ball", "", "a ball"),
        SDEdit(0.5, noise),
        NNField(),
        Settings(steps=4, keyframe_every=4),
        on_step=lambda *stage: stages.append(stage),
    )
    assert result.clip.frames.shape == clip.frames.shape
    assert [stage for stage in stages if stage[0] == "edit"] == [("edit", 3, 4), ("edit", 4, 4)]


@pytest.mark.full
def test_the_source_itself_comes_back_from_its_own_prompt_unguided(
    backbone: Backbone, clip: Clip
) -> None:
    """At a guidance of 1 each frame retraces its inversion, the better the later it starts."""

    def change(strength: float) -> float:
        settings = Settings(steps=20, guidance=1.0, consistency="none")
        prompts = Prompts("a ball", "", "a ball")
        result = edit_clip(backbone, clip, prompts, SDEdit(strength), NNField(), settings)
        latents = backbone.encode(clip.frames)
        back = backbone.decode(latents)
        return float((result.clip.frames - back).abs().mean())

    least = change(0.05)
    assert least < change(1.0)
    # one step forth and back differs by where ε is taken alone
    assert least < 1e-3
