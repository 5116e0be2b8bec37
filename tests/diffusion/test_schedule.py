import copy
import itertools
import math

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from tokenflow.diffusion import Schedule, guide
from tokenflow.diffusion.inversion import InversionSolver, inversion_steps
from tokenflow.diffusion.schedule import PredictionType, Timestep, require_finite
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


def flow(steps: int) -> Schedule:
    """Rectified flow: at time t the latent is (1 - t) · x0 + t · n."""
    times = [1 - i / steps for i in range(steps + 1)]
    timesteps = tuple(1000 * t for t in times[:-1])
    return Schedule(timesteps, tuple(1 - t for t in times), tuple(times), "flow")


def made(prediction: PredictionType, steps: int) -> Schedule:
    """A schedule of any kind."""
    if prediction == "flow":
        return flow(steps)
    return Schedule.from_ddim(EPSILON if prediction == "epsilon" else VELOCITY, steps)


def exact(schedule: Schedule, x0: Tensor, n: Tensor, i: int) -> Tensor:
    """What a network that knows x0 and n puts out at level i, by the prediction's definition."""
    signal, noise = schedule.signal[i], schedule.noise[i]
    return {"epsilon": n, "v_prediction": signal * n - noise * x0, "flow": n - x0}[
        schedule.prediction
    ]


every_prediction = pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow"])


@every_prediction
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_split_undoes_mix(prediction: PredictionType, steps: int) -> None:
    schedule = made(prediction, steps)
    x0, n = torch.randn(2, 100, dtype=torch.float64)
    for i in range(steps + 1):
        found = schedule.split(exact(schedule, x0, n, i), schedule.mix(x0, n, i), i)
        # float64's 1e-16, 15 times larger for the 1 / signal of the noisiest level
        for one, other in zip(found, (x0, n), strict=True):
            assert torch.allclose(one, other, rtol=0, atol=1e-13)


@every_prediction
def test_a_step_by_the_exact_output_is_the_next_level(prediction: PredictionType) -> None:
    schedule = made(prediction, 7)
    x0, n = torch.randn(2, 100, dtype=torch.float64)
    for i in range(7):
        x = schedule.mix(x0, n, i)
        found = schedule.step(exact(schedule, x0, n, i), x, i)
        assert torch.allclose(found, schedule.mix(x0, n, i + 1), rtol=0, atol=1e-13)


@every_prediction
def test_a_step_tells_the_clean_latent_that_it_leads_to(prediction: PredictionType) -> None:
    schedule, (x, output, other) = made(prediction, 5), torch.randn(3, 2, 4, 8, 8).double()
    for i in range(len(schedule)):
        following = schedule.step(output, x, i)
        x0, _ = schedule.split(output, x, i)
        torch.testing.assert_close(schedule.clean(x, following, i), x0)
        torch.testing.assert_close(schedule.towards(x0, x, i), following)
        torch.testing.assert_close(schedule.clean(x, schedule.towards(other, x, i), i), other)


def test_a_schedule_may_end_at_its_last_timesteps_level() -> None:
    options = {"steps_offset": 0, "set_alpha_to_one": False, "timestep_spacing": "leading"}
    schedule = Schedule.from_ddim(DDIMScheduler(**options), 4)
    assert [schedule.leads(i) for i in range(4)] == [True, True, True, False]


@every_prediction
def test_a_step_undoes_a_step_of_inversion(prediction: PredictionType) -> None:
    """Where the network sees the same clean latent and noise at both ends of the step."""
    schedule = made(prediction, 7)
    x0, n = torch.randn(2, 100, dtype=torch.float64)
    for i in range(7):
        x = schedule.mix(x0, n, i + 1)
        given = exact(schedule, x0, n, i)
        if prediction == "v_prediction":  # for which x is taken to be at level i
            given = (n - schedule.noise[i] * x) / schedule.signal[i]
        noisier = schedule.invert(given, x, i)
        assert torch.allclose(noisier, schedule.mix(x0, n, i), rtol=0, atol=1e-12)
        back = schedule.step(exact(schedule, x0, n, i), noisier, i)
        assert torch.allclose(back, x, rtol=0, atol=1e-12)


@every_prediction
def test_a_gaussians_latents_come_back(prediction: PredictionType) -> None:
    """The output is known for latents of N(0, 0.25): the mean of x0 and n where x was seen."""
    schedule, variance = made(prediction, 200), 0.25

    def output(x: Tensor, i: int) -> Tensor:
        signal, noise = schedule.signal[i], schedule.noise[i]
        seen = x / (signal**2 * variance + noise**2)
        return exact(schedule, signal * variance * seen, noise * seen, i)

    clean = torch.linspace(-1, 1, 9, dtype=torch.float64)
    x = clean
    for i in reversed(range(len(schedule))):
        x = schedule.invert(output(x, i), x, i)
    # the flow from data to noise is linear: its scale is that of the standard deviations
    last = (schedule.signal[0] ** 2 * variance + schedule.noise[0] ** 2) ** 0.5
    first = (schedule.signal[-1] ** 2 * variance + schedule.noise[-1] ** 2) ** 0.5
    # first-order errors of 200 steps; measured 0.0034 (noise, velocity) and 0.0026 (flow)
    assert torch.allclose(x, clean * last / first, rtol=0.0045, atol=0)
    for i in range(len(schedule)):
        x = schedule.step(output(x, i), x, i)
    # measured 0.009 and 0.0048
    assert torch.allclose(x, clean, rtol=0.012, atol=0)


@every_prediction
def test_a_gaussians_latents_come_back_from_uni_inv(prediction: PredictionType) -> None:
    clean = torch.linspace(-1, 1, 9, dtype=torch.float64)[:, None, None, None]

    def error(steps: int, solver: InversionSolver) -> float:
        schedule = made(prediction, steps)

        def output(_: list[int], x: Tensor, t: Timestep) -> Tensor:
            i = schedule.timesteps.index(t)
            signal, noise = schedule.signal[i], schedule.noise[i]
            seen = x / (signal**2 * 0.25 + noise**2)
            return exact(schedule, signal * 0.25 * seen, noise * seen, i)

        *_, (_, x) = inversion_steps(output, clean, list(range(9)), schedule, solver)
        for i, t in enumerate(schedule.timesteps):
            x = schedule.step(output([], x, t), x, i)
        return float((x - clean).abs().max())

    assert error(50, "uni-inv") < 0.3 * error(50, "ddim")
    assert error(200, "uni-inv") < 0.3**2 * error(50, "uni-inv")  # of second order


def test_a_velocity_inverts_as_the_noise_that_it_means() -> None:
    noise, velocity = made("epsilon", 10), made("v_prediction", 10)
    x, output = torch.randn(2, 100, dtype=torch.float64)
    for i in reversed(range(10)):
        _, n = velocity.split(output, x, i)
        expected = noise.invert(n, x, i)
        assert torch.allclose(velocity.invert(output, x, i), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scheduler", [EPSILON, VELOCITY], ids=["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 7, 50])
def test_steps_are_those_of_diffusers(scheduler: DDIMScheduler, steps: int) -> None:
    schedule = Schedule.from_ddim(scheduler, steps)
    scheduler = copy.deepcopy(scheduler)
    # its float32 roots are another result than ours where a product nearly cancels another
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    scheduler.set_timesteps(steps)
    assert schedule.timesteps == tuple(scheduler.timesteps.tolist())
    x = torch.randn(4, 8, 8, dtype=torch.float64)
    for i, t in enumerate(schedule.timesteps):
        output = torch.randn(4, 8, 8, dtype=torch.float64)
        expected = scheduler.step(output, int(t), x, eta=0.0)
        estimate, _ = schedule.split(output, x, i)
        x = schedule.step(output, x, i)
        assert torch.allclose(estimate, expected.pred_original_sample, rtol=0, atol=1e-10)
        assert torch.allclose(x, expected.prev_sample, rtol=0, atol=1e-10)


def test_velocity_is_diffusers() -> None:
    schedule = Schedule.from_ddim(VELOCITY, 10)
    clean, noise = torch.randn(2, 4, 8, 8)
    for i, t in enumerate(schedule.timesteps):
        steps = torch.tensor([int(t)])
        x = VELOCITY.add_noise(clean, noise, steps)
        velocity = VELOCITY.get_velocity(clean, noise, steps)
        # two float32 products of numbers below 5
        assert torch.allclose(schedule.split(velocity, x, i)[1], noise, rtol=0, atol=2e-6)
        assert torch.allclose(schedule.mix(clean, noise, i), x, rtol=0, atol=2e-6)


def test_flow_steps_are_eulers() -> None:
    schedule, x = flow(5), torch.randn(100, dtype=torch.float64)
    for i, (t, after) in enumerate(itertools.pairwise(schedule.noise)):
        output = torch.randn(100, dtype=torch.float64)
        assert torch.allclose(schedule.step(output, x, i), x + (after - t) * output, atol=1e-14)
        assert torch.allclose(schedule.invert(output, x, i), x + (t - after) * output, atol=1e-14)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 2, 50, 61, 122, 999])
def test_timesteps_are_as_many_as_asked_for(spacing: str, steps: int) -> None:
    """Diffusers' own "trailing" has a 62nd timestep of -1 for 61 steps."""
    scheduler = DDIMScheduler(**STABLE_DIFFUSION, timestep_spacing=spacing)
    schedule = Schedule.from_ddim(scheduler, steps)
    timesteps = schedule.timesteps
    assert len(schedule) == len(timesteps) == steps
    assert sorted(set(timesteps), reverse=True) == list(timesteps)
    assert timesteps[-1] >= 0
    assert timesteps[0] < 1000


def test_leading_levels_are_stable_diffusions() -> None:
    schedule = Schedule.from_ddim(EPSILON, 4)
    assert schedule.timesteps == (751, 501, 251, 1)
    alphas = [float(EPSILON.alphas_cumprod[t]) for t in (751, 501, 251, 1, 0)]
    assert schedule.signal == tuple(map(math.sqrt, alphas))
    assert schedule.noise == tuple(math.sqrt(1 - a) for a in alphas)


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
        Schedule.from_ddim(EPSILON, steps)


@pytest.mark.parametrize(
    ("timesteps", "levels"), [((), (1.0,)), ((1,), (1.0,)), ((2, 1), (0.5, 1.0))]
)
def test_a_schedule_needs_a_level_more_than_timesteps(
    timesteps: tuple[float, ...], levels: tuple[float, ...]
) -> None:
    with pytest.raises(ValueError, match=f"got {len(timesteps)} timesteps, {len(levels)} and"):
        Schedule(timesteps, levels, levels)


def test_a_schedule_does_not_change_with_the_scheduler() -> None:
    schedule = Schedule.from_ddim(EPSILON, 4)
    Schedule.from_ddim(EPSILON, 7)
    assert len(schedule) == 4


GRIDS = {n: Schedule.from_ddim(EPSILON, n) for n in [*range(1, 131), 200, 500, 999]}


@pytest.mark.parametrize("sampling", [1, 2, 3, 7, 10, 13, 25, 29, 30, 50, 53, 60])
def test_a_refined_grid_contains_the_sampling_levels(sampling: int) -> None:
    schedule = GRIDS[sampling]
    levels = set(zip(schedule.timesteps, schedule.signal, schedule.noise, strict=False))
    for steps in [*range(sampling, sampling + 71), 500, 999]:
        refined = schedule.refined(GRIDS[steps])
        assert len(refined) == steps
        assert sorted(set(refined.timesteps), reverse=True) == list(refined.timesteps)
        assert levels <= set(zip(refined.timesteps, refined.signal, refined.noise, strict=False))
        assert list(refined.signal) == sorted(refined.signal)
        assert (refined.signal[-1], refined.noise[-1]) == (schedule.signal[-1], schedule.noise[-1])


@pytest.mark.parametrize(("sampling", "steps"), [(50, 500), (50, 50), (50, 100), (10, 200), (1, 9)])
def test_a_grid_that_contains_the_sampling_levels_stays(sampling: int, steps: int) -> None:
    assert GRIDS[sampling].refined(GRIDS[steps]) == GRIDS[steps]


def test_refined_timesteps_stay_near_the_grids() -> None:
    grid = GRIDS[99]  # every tenth
    refined = GRIDS[30].refined(grid)
    pairs = zip(grid.timesteps, refined.timesteps, strict=True)
    assert max(abs(a - b) for a, b in pairs) <= 5


def test_a_flow_schedule_is_refined_likewise() -> None:
    refined = flow(4).refined(flow(6))
    assert refined.prediction == "flow"
    assert set(flow(4).timesteps) <= set(refined.timesteps)
    for t, signal, noise in zip(refined.timesteps, refined.signal, refined.noise, strict=False):
        assert noise == pytest.approx(t / 1000)
        assert signal + noise == pytest.approx(1)


def test_a_grid_with_fewer_levels() -> None:
    with pytest.raises(InputError, match="got 9 inversion steps for 10 sampling steps"):
        GRIDS[10].refined(GRIDS[9])


def test_timesteps_that_are_passed() -> None:
    schedule = Schedule.from_ddim(EPSILON, 4)
    assert [schedule.passed(t) for t in (999, 751, 750, 501, 251, 1, 0)] == [0, 0, 1, 1, 2, 3, 4]


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
