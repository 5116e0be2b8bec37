import pytest
import torch
from diffusers import DDIMScheduler

from tokenflow.diffusion import Schedule
from tokenflow.diffusion.sampling import clean_estimate, ddim_step, guide, require_finite
from tokenflow.errors import DivergedError, InputError

STABLE_DIFFUSION = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
EPSILON = DDIMScheduler(**STABLE_DIFFUSION)
VELOCITY = DDIMScheduler(**STABLE_DIFFUSION, prediction_type="v_prediction")
NOISIEST, CLEANEST = 0.0047, 0.9991  # Stable Diffusion's


@pytest.mark.parametrize(("a", "b"), [(CLEANEST, NOISIEST), (0.9, 0.85), (NOISIEST, CLEANEST)])
def test_a_step_back_undoes_a_step(a: float, b: float) -> None:
    x, epsilon = torch.randn(2, 100, dtype=torch.float64)
    back = ddim_step(ddim_step(x, epsilon, a, b), epsilon, b, a)
    # float64's 1e-16, 15 times larger for 1 / sqrt(0.0047)
    assert torch.allclose(back, x, rtol=0, atol=1e-13)


def test_a_step_to_where_it_is_changes_nothing() -> None:
    x, epsilon = torch.randn(2, 100, dtype=torch.float64)
    assert torch.allclose(ddim_step(x, epsilon, 0.3, 0.3), x, rtol=0, atol=1e-14)


def test_the_clean_estimate_is_what_was_noised() -> None:
    clean, noise = torch.randn(2, 100, dtype=torch.float64)
    noised = 0.3**0.5 * clean + 0.7**0.5 * noise
    assert torch.allclose(clean_estimate(noised, noise, 0.3), clean, rtol=0, atol=1e-14)


@pytest.mark.parametrize("scheduler", [EPSILON, VELOCITY], ids=["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 7, 50])
def test_steps_are_those_of_diffusers(scheduler: DDIMScheduler, steps: int) -> None:
    schedule = Schedule.from_scheduler(scheduler, steps)
    scheduler.set_timesteps(steps)
    assert schedule.timesteps == tuple(scheduler.timesteps.tolist())
    x = expected = torch.randn(4, 8, 8)
    for t in schedule.timesteps:
        output = torch.randn(4, 8, 8)
        # from the same x, so that rounding does not add up
        expected = scheduler.step(output, t, x, eta=0.0)
        epsilon = schedule.epsilon(output, x, t)
        a, a_next = schedule.alpha(t), schedule.alpha(schedule.following(t))
        estimate = clean_estimate(x, epsilon, a)
        x = ddim_step(x, epsilon, a, a_next)
        # float32's 1e-7 of the largest clean estimate
        tolerance = 2e-6 * float(estimate.abs().max())
        assert torch.allclose(estimate, expected.pred_original_sample, rtol=0, atol=tolerance)
        assert torch.allclose(x, expected.prev_sample, rtol=0, atol=tolerance)


def test_velocity_means_the_noise_it_was_made_from() -> None:
    schedule = Schedule.from_scheduler(VELOCITY, 10)
    clean, noise = torch.randn(2, 4, 8, 8)
    for t in schedule.timesteps:
        steps = torch.tensor([t])
        x = VELOCITY.add_noise(clean, noise, steps)
        velocity = VELOCITY.get_velocity(clean, noise, steps)
        # two float32 products of numbers below 5
        assert torch.allclose(schedule.epsilon(velocity, x, t), noise, rtol=0, atol=2e-6)


def test_epsilon_prediction_is_taken_as_it_is() -> None:
    output = torch.randn(4)
    assert Schedule.from_scheduler(EPSILON, 10).epsilon(output, torch.randn(4), 1) is output


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 2, 50, 61, 122, 999])
def test_timesteps_are_as_many_as_asked_for(spacing: str, steps: int) -> None:
    """Diffusers' own "trailing" has a 62nd timestep of -1 for 61 steps."""
    scheduler = DDIMScheduler(**STABLE_DIFFUSION, timestep_spacing=spacing)
    timesteps = Schedule.from_scheduler(scheduler, steps).timesteps
    assert len(timesteps) == steps
    assert sorted(set(timesteps), reverse=True) == list(timesteps)
    assert timesteps[-1] >= 0
    assert timesteps[0] < 1000


def test_leading_timesteps_are_stable_diffusions() -> None:
    schedule = Schedule.from_scheduler(EPSILON, 4)
    assert schedule.timesteps == (751, 501, 251, 1)
    assert [schedule.following(t) for t in schedule.timesteps] == [501, 251, 1, None]
    assert schedule.alpha(None) == float(EPSILON.alphas_cumprod[0])
    assert schedule.alpha(501) == float(EPSILON.alphas_cumprod[501])


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (0, "expected 1 to 1000 steps, got 0"),
        (-1, "expected 1 to 1000 steps, got -1"),
        (1001, "expected 1 to 1000 steps, got 1001"),
        (1000, "1000 steps and the scheduler's offset of 1 reach timestep 1000"),
    ],
)
def test_bad_numbers_of_steps(steps: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Schedule.from_scheduler(EPSILON, steps)


def test_a_schedule_does_not_change_with_the_scheduler() -> None:
    schedule = Schedule.from_scheduler(EPSILON, 4)
    Schedule.from_scheduler(EPSILON, 7)
    assert len(schedule.timesteps) == 4


@pytest.mark.parametrize(("scale", "expected"), [(0.0, 1.0), (1.0, 3.0), (7.5, 16.0)])
def test_guidance(scale: float, expected: float) -> None:
    assert guide(torch.tensor(1.0), torch.tensor(3.0), scale) == expected


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_latents_must_stay_finite(value: float) -> None:
    latents = torch.zeros(2, 4, 8, 8)
    require_finite(latents, "sampling at step 3 (timestep 601)")
    latents[1, 2, 3, 4] = value
    with pytest.raises(DivergedError, match=r"in sampling at step 3 \(timestep 601\)"):
        require_finite(latents, "sampling at step 3 (timestep 601)")
