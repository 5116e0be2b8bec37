"""Text to image, beside diffusers' own pipeline."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from tokenflow.diffusion import Backbone
from tokenflow.diffusion.text_to_image import text_to_image

PROMPTS = ["a plain red ball on grass", "a striped blue box on sand"]


def test_it_is_diffusers_pipeline(backbone: Backbone) -> None:
    pipeline = StableDiffusionPipeline(
        backbone.vae, backbone.text_encoder, backbone.tokenizer, backbone.unet,
        backbone.scheduler, safety_checker=None, feature_extractor=None,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    size = backbone.unet.config.sample_size
    noise = torch.randn(2, 4, size, size, generator=torch.Generator().manual_seed(7))
    expected = pipeline(
        PROMPTS, num_inference_steps=4, guidance_scale=3.0, latents=noise, output_type="pt"
    ).images
    found = text_to_image(backbone, PROMPTS, steps=4, guidance=3.0, seed=7)
    # float32, sums in another order
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_inputs_are_asked_for_at_every_step(backbone: Backbone) -> None:
    asked: list[int] = []

    def inputs(latents: Tensor, step: int) -> dict[str, Any]:
        assert torch.equal(*latents.chunk(2))
        asked.append(step)
        some = torch.zeros(len(latents), 16)
        some[:, :3] = 1
        return {"encoder_attention_mask": some}  # of the prompt only its beginning

    plain = text_to_image(backbone, PROMPTS, steps=3, guidance=3.0, seed=7)
    found = text_to_image(backbone, PROMPTS, steps=3, guidance=3.0, seed=7, inputs=inputs)
    assert asked == [0, 1, 2]
    assert (found - plain).abs().max() > 1e-4
