"""The distillation on one batch, and the folder that it writes in diffusers' pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, LatentConsistencyModelPipeline, UNet2DConditionModel
from torch import Tensor, nn

from tests.training.test_modules import at_step, tokenized
from tokenflow.diffusion import Backbone
from training.consistency import ConsistencyDistillation
from training.networks import new_consistency_scheduler, new_scheduler
from training.train import save_lcm

CAPTIONS = ["a striped red ball on grass", "a plain blue box on sand"]


@pytest.fixture(scope="module")
def miniature() -> Backbone:
    return Backbone.load("miniature", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def stage(miniature: Backbone) -> ConsistencyDistillation:
    """Of a small random teacher."""
    torch.manual_seed(0)
    teacher = UNet2DConditionModel.from_config(
        miniature.unet.config,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(32, 32),
        attention_head_dim=1,
        layers_per_block=1,
    )
    nothing = tokenized(miniature, [""])[0]
    return ConsistencyDistillation(
        teacher, miniature.text_encoder, nothing, new_consistency_scheduler()
    )


@pytest.fixture(scope="module")
def text(stage: ConsistencyDistillation, miniature: Backbone) -> Tensor:
    with torch.inference_mode():
        return stage.text_encoder(tokenized(miniature, [*CAPTIONS, ""]))[0]


def test_before_training_the_teacher_is_not_changed(
    stage: ConsistencyDistillation, text: Tensor
) -> None:
    x, t = torch.randn(2, 4, 32, 32), torch.tensor([299, 999])
    with torch.inference_mode():
        clean = stage.clean(x, t, text[:2], torch.tensor([1.0, 4.0]))
        expected = stage.split(x, stage.teacher(x, t, text[:2]).sample, t)
    torch.testing.assert_close(clean, expected, atol=1e-4, rtol=1e-4)


def test_the_teachers_step_is_ddims(stage: ConsistencyDistillation, text: Tensor) -> None:
    x, guidance = torch.randn(2, 4, 32, 32), torch.tensor([2.0, 3.0])
    scheduler = DDIMScheduler.from_config(new_scheduler().config, timestep_spacing="trailing")
    scheduler.set_timesteps(50)
    with torch.inference_mode():
        t, earlier = torch.tensor([599, 599]), torch.tensor([579, 579])
        step = stage.teacher_step(x, t, earlier, text[:2], text[2:], guidance)
        told, untold = (
            stage.teacher(x, 599, y).sample for y in (text[:2], text[2:].expand(2, -1, -1))
        )
        noise = untold + guidance.view(2, 1, 1, 1) * (told - untold)
        expected = scheduler.step(noise, 599, x).prev_sample
    torch.testing.assert_close(step, expected, atol=1e-4, rtol=1e-4)


def test_at_timestep_zero_nothing_is_denoised(stage: ConsistencyDistillation, text: Tensor) -> None:
    x = torch.randn(2, 4, 32, 32)
    with torch.inference_mode():
        clean = stage.clean(x, torch.zeros(2, dtype=torch.long), text[:2], torch.ones(2))
    assert torch.equal(clean, x)


def test_only_the_distilled_network_learns(
    stage: ConsistencyDistillation, miniature: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_step(stage, 999, monkeypatch)
    loss = stage.loss(torch.randn(2, 4, 32, 32), tokenized(miniature, CAPTIONS))
    loss.backward()
    learning = {name.split(".")[0] for name, p in stage.named_parameters() if p.grad is not None}
    assert learning == {"unet"}
    assert stage.unet.time_embedding.cond_proj.weight.grad.any()
    stage.zero_grad()


def test_diffusers_pipeline_samples_by_the_consistency_function(
    stage: ConsistencyDistillation, text: Tensor, tmp_path: Path
) -> None:
    """One step: the whole noise to a picture, at the scale of guidance that was asked for."""
    torch.manual_seed(0)
    for name, parameter in stage.unet.named_parameters():
        if "time_emb" in name:
            nn.init.normal_(parameter, std=0.1)
    save_lcm(stage, tmp_path)
    stage.float()
    pipe = LatentConsistencyModelPipeline.from_pretrained(tmp_path, torch_dtype=torch.float32)
    noise = torch.randn(1, 4, 32, 32)
    latents = pipe(
        CAPTIONS[0], num_inference_steps=1, guidance_scale=3.0, latents=noise, output_type="latent"
    ).images
    with torch.inference_mode():
        expected = stage.clean(noise, torch.tensor([999]), text[:1], torch.tensor([3.0]))
        other = stage.clean(noise, torch.tensor([999]), text[:1], torch.tensor([2.0]))
    torch.testing.assert_close(latents, expected, atol=1e-3, rtol=1e-3)
    assert (other - expected).abs().max() > 0.1
    assert Backbone.load(tmp_path, "cpu", "float32").defaults.guidance == 3
