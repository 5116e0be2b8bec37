from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler

from tests.diffusion.making import with_unet
from tests.gaussian_flow import GaussianFlow
from tokenflow.diffusion import Backbone, Schedule, StableDiffusion, Trajectory
from tokenflow.editors import Injection, PnP
from tokenflow.errors import InputError


@pytest.fixture
def trajectory() -> Trajectory:
    """Random latents, of inversion that went beyond the first of three sampling timesteps."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(5, 2, 4, 8, 8, generator=generator)
    levels = 0.006**0.5, 0.994**0.5
    return Trajectory((667, 334, 1), latents[:3], latents[3], latents[4], *levels)


@pytest.fixture
def schedule(backbone: Backbone) -> Schedule:
    return backbone.schedule(3)


@pytest.fixture(scope="module")
def full_depth(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    """A tiny model with as many layers as Stable Diffusion."""
    folder = with_unet(tmp_path_factory.mktemp("model"), layers_per_block=2)
    return Backbone.load(folder, "cpu", "float32")


def of_end(injections: Any, end: float) -> list[str]:
    """The layers of injections that end there."""
    return [injection.layer for injection in injections if injection.end == end]


def test_the_layers_are_the_papers(full_depth: Backbone) -> None:
    injections = PnP(attention=0.3, features=0.7).injections(full_depth)
    assert of_end(injections, 0.7) == ["up_blocks.1.resnets.1.conv2"]
    attentions = [
        f"up_blocks.{block}.attentions.{i}.transformer_blocks.0.attn1"
        for block, i in [(1, 1), (1, 2), (2, 0), (2, 1), (2, 2), (3, 0), (3, 1), (3, 2)]
    ]
    expected = [f"{site}.{projection}" for projection in ("to_q", "to_k") for site in attentions]
    assert of_end(injections, 0.3) == expected
    assert len(injections) == 17
    assert all(one.begin == 0 and one.function is None for one in injections)


def test_more_layers_take_features(full_depth: Backbone) -> None:
    injections = PnP(features=0.7, feature_layers=3).injections(full_depth)
    places = [(1, 1), (1, 2), (2, 0)]
    assert of_end(injections, 0.7) == [f"up_blocks.{b}.resnets.{i}.conv2" for b, i in places]


def test_what_is_not_given_is_the_models_own() -> None:
    model = GaussianFlow()
    (plain,) = PnP().injections(model)
    assert plain == Injection("tokens", end=model.defaults.features)
    (given,) = PnP(features=0.2).injections(model)
    assert given.end == 0.2


def test_starts_at_the_inverted_latent(trajectory: Trajectory, schedule: Schedule) -> None:
    start = PnP().start(trajectory.source([1]), schedule, 0)
    assert torch.equal(start.latents, trajectory.latents[0, 1:])
    assert start.step == 0


def test_renoised_adds_the_noisiest_latents_noise(
    trajectory: Trajectory, schedule: Schedule, backbone: StableDiffusion
) -> None:
    start = PnP(start_from="renoised").start(trajectory.source(), schedule, 0)
    noisiest, clean = trajectory.noisiest, trajectory.clean
    noise = (noisiest - 0.006**0.5 * clean) / 0.994**0.5
    scheduler = backbone.scheduler
    assert isinstance(scheduler, DDIMScheduler)
    expected = scheduler.add_noise(clean, noise, torch.tensor([int(schedule.timesteps[0])] * 2))
    # the same formula with float32 instead of float64 factors
    assert torch.allclose(start.latents, expected, rtol=0, atol=1e-5)
    assert start.step == 0


def test_renoised_is_the_inverted_latent_where_inversion_ended_there(schedule: Schedule) -> None:
    latents = torch.randn(4, 2, 4, 8, 8)
    levels = schedule.signal[0], schedule.noise[0]
    trajectory = Trajectory(schedule.timesteps, latents[:3], latents[3], latents[0], *levels)
    start = PnP(start_from="renoised").start(trajectory.source(), schedule, 0)
    # noise taken off and put on again, in float32
    assert torch.allclose(start.latents, latents[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": -0.1}, r"attention must be a share of the steps from 0 to 1, got -0\.1"),
        ({"attention": 1.5}, r"attention must be a share .* got 1\.5"),
        ({"features": float("nan")}, "features must be a share .* got nan"),
        ({"features": 2.0}, "features must be a share"),
        ({"feature_layers": 0}, "feature_layers must be at least 1, got 0"),
        ({"start_from": "noise"}, "start_from must be 'inverted' or 'renoised', got 'noise'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        PnP(**options)


@pytest.mark.parametrize(("values", "roles"), [(None, 3), (True, 3), (False, 2)])
def test_a_transformer_takes_values_as_well(values: bool | None, roles: int) -> None:
    model = Backbone.load("miniature-transformer", "cpu", "float32")
    injections = PnP(attention=0.3, inject_values=values).injections(model)
    layers = {role: model.layers(role) for role in ("queries", "keys", "values")}
    expected = [layer for role in list(layers)[:roles] for layer in layers[role]]
    assert [(one.layer, one.end) for one in injections] == [(layer, 0.3) for layer in expected]
    assert not set(layers["values"]) & {
        one.layer for one in PnP(inject_values=False).injections(model)
    }
