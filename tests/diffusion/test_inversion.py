import math

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor

from tokenflow.diffusion import (
    Backbone,
    StableDiffusion,
    Trajectory,
    invert,
    reconstruct,
    source_prediction,
)
from tokenflow.errors import DivergedError, InputError

SAMPLING, INVERSION = 4, 7


@pytest.fixture(scope="module")
def small(backbone: StableDiffusion) -> StableDiffusion:
    """The tiny model with a UNet of two levels, for many steps."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(8, 8),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    # a random network's noise changes faster from step to step than a trained one's
    unet.conv_out.weight.data *= 0.1
    parts = (backbone.vae, backbone.text_encoder, backbone.tokenizer, backbone.scheduler)
    return StableDiffusion(unet, *parts)


@pytest.fixture(scope="module")
def latents() -> Tensor:
    return torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(3))


def inverted(backbone: Backbone, latents: Tensor, batch: int = 8) -> Trajectory:
    return invert(backbone, latents, "a ball", backbone.schedule(SAMPLING), INVERSION, batch)


def test_fewer_steps_than_sampling(backbone: Backbone, latents: Tensor) -> None:
    with pytest.raises(InputError, match="got 9 inversion steps for 10 sampling steps"):
        invert(backbone, latents, "", backbone.schedule(10), 9)


def test_more_steps_than_the_model_has(backbone: Backbone, latents: Tensor) -> None:
    with pytest.raises(InputError, match="expected 1 to 1000 steps, got 1001"):
        invert(backbone, latents, "", backbone.schedule(10), 1001)


def test_agrees_with_a_naive_loop(backbone: StableDiffusion, latents: Tensor) -> None:
    schedule = backbone.schedule(SAMPLING)
    trajectory = inverted(backbone, latents)
    timesteps = schedule.refined(backbone.schedule(INVERSION)).timesteps[::-1]
    alphas = backbone.scheduler.alphas_cumprod.double()
    text = backbone.embed(["a ball"])["embeddings"]
    for frame in range(len(latents)):
        x, a_before = latents[frame : frame + 1].double(), alphas[0]  # set_alpha_to_one is off
        for t in timesteps:
            with torch.no_grad():
                noise = backbone.unet(x.float(), t, encoder_hidden_states=text).sample.double()
            clean = (x - (1 - a_before).sqrt() * noise) / a_before.sqrt()
            x, a_before = alphas[t].sqrt() * clean + (1 - alphas[t]).sqrt() * noise, alphas[t]
            if t in schedule.timesteps:
                # float32 against float64 through seven steps of a network; measured 1e-6
                assert torch.allclose(
                    trajectory.at(schedule.timesteps.index(t))[frame],
                    x[0].float(),
                    rtol=0,
                    atol=1e-5,
                )
        assert torch.allclose(trajectory.noisiest[frame], x[0].float(), rtol=0, atol=1e-5)
    assert trajectory.timesteps == schedule.timesteps
    noisiest = float(backbone.scheduler.alphas_cumprod[timesteps[-1]])
    assert trajectory.noisiest_signal == noisiest**0.5
    assert trajectory.noisiest_noise == (1 - noisiest) ** 0.5


@pytest.mark.parametrize("batch", [1, 2])
def test_batch_changes_nothing(backbone: Backbone, latents: Tensor, batch: int) -> None:
    one, other = inverted(backbone, latents), inverted(backbone, latents, batch)
    # float32 sums in another order
    assert torch.allclose(one.latents, other.latents, rtol=0, atol=1e-5)


def test_the_source_is_kept_as_it_was(backbone: Backbone, latents: Tensor) -> None:
    before = latents.clone()
    trajectory = inverted(backbone, latents)
    assert torch.equal(latents, before)
    assert torch.equal(trajectory.clean, before)
    kept = trajectory.latents.clone()
    schedule = backbone.schedule(SAMPLING)
    reconstruct(backbone, source_prediction(backbone, ""), trajectory, schedule)
    assert torch.equal(trajectory.latents, kept)


def test_the_prompt_counts(backbone: Backbone, latents: Tensor) -> None:
    schedule = backbone.schedule(SAMPLING)
    other = invert(backbone, latents, "", schedule, INVERSION)
    assert not torch.allclose(other.latents, inverted(backbone, latents).latents, atol=1e-4)


def test_reconstruct_samples_as_diffusers_does(backbone: StableDiffusion, latents: Tensor) -> None:
    schedule, trajectory = backbone.schedule(SAMPLING), inverted(backbone, latents)
    back = reconstruct(
        backbone, source_prediction(backbone, "a ball"), trajectory, schedule, batch=2
    )
    scheduler = DDIMScheduler.from_config(backbone.scheduler.config)
    scheduler.set_timesteps(SAMPLING)
    x, text = trajectory.at(0), backbone.embed(["a ball"])["embeddings"].expand(3, -1, -1)
    for t in scheduler.timesteps:
        with torch.no_grad():
            noise = backbone.unet(x, t, encoder_hidden_states=text).sample
        x = scheduler.step(noise, int(t), x).prev_sample
    # float32, 15 times larger for the 1 / sqrt(alpha) of the noisiest timestep; measured 2e-6
    assert torch.allclose(back, x, rtol=0, atol=2e-5)


def test_progress_counts_steps(backbone: Backbone, latents: Tensor) -> None:
    schedule, calls = backbone.schedule(2), []
    trajectory = invert(backbone, latents[:1], "", schedule, 3, progress=lambda: calls.append(1))
    assert len(calls) == 3
    reconstruct(
        backbone,
        source_prediction(backbone, ""),
        trajectory,
        schedule,
        progress=calls.append,
    )
    assert calls == [1, 1, 1, 1, 2]


def test_latents_that_are_not_finite(backbone: Backbone, latents: Tensor) -> None:
    broken = latents.clone()
    broken[1, 0, 0, 0] = math.nan
    with pytest.raises(DivergedError, match=r"in inversion at step 0 \(timestep 1\)"):
        inverted(backbone, broken)


def test_a_reconstruction_that_is_not_finite(backbone: Backbone, latents: Tensor) -> None:
    schedule, trajectory = backbone.schedule(SAMPLING), inverted(backbone, latents)
    trajectory.latents[0, 1, 0, 0, 0] = math.inf
    first = schedule.timesteps[0]
    with pytest.raises(DivergedError, match=rf"in reconstruction at step 0 \(timestep {first}\)"):
        reconstruct(backbone, source_prediction(backbone, ""), trajectory, schedule)


def test_more_steps_reconstruct_better(small: Backbone, latents: Tensor) -> None:
    errors = []
    for steps in (10, 50):
        schedule = small.schedule(steps)
        trajectory = invert(small, latents[:2], "", schedule, steps)
        back = reconstruct(small, source_prediction(small, ""), trajectory, schedule)
        errors.append(float((back - latents[:2]).square().mean().sqrt() / latents[:2].std()))
    # measured: 0.056, 0.024 (200 steps: 0.0072), in units of the latents' standard deviation
    assert 0.01 < errors[0] < 0.08
    assert errors[1] < 0.6 * errors[0]
