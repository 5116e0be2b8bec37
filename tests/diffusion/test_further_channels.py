"""UNets that take more than latents: depth, or a mask and what it leaves of the frame."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    StableDiffusionDepth2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLInpaintPipeline,
    UNet2DConditionModel,
)
from torch import Tensor

from tests.diffusion.making import sampled, with_channels, write_tiny_xl
from tokenflow.diffusion import Backbone, ModelError, StableDiffusion, StableDiffusionXL
from tokenflow.diffusion.backbone import VARIANT_PARTS
from tokenflow.engine.further_channels import further_channels
from tokenflow.engine.ranks.group import FrameGroup
from tokenflow.engine.region import Region
from tokenflow.testing import check_backbone, tiny_clip
from tokenflow.video import Clip

FRAMES = 2
PROMPTS: dict[str, Any] = {
    "prompt": ["a red ball"] * FRAMES, "negative_prompt": ["grass"] * FRAMES,
    "num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "latent",
}  # fmt: skip


VARIANT = {part: ["library", kind] for part, kind in VARIANT_PARTS.items()}


@pytest.fixture(scope="module")
def depth_model(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    folder = with_channels(tmp_path_factory.mktemp("depth"), 5)
    # a component that nobody asks for is not loaded
    index = {"_class_name": "StableDiffusionDepth2ImgPipeline", **VARIANT}
    index["depth_estimator"] = ["transformers", "DPTForDepthEstimation"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return Backbone.load(folder, "cpu", "float32")


@pytest.fixture(scope="module")
def painting_model(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    folder = with_channels(tmp_path_factory.mktemp("inpainting"), 9)
    index = {"_class_name": "StableDiffusionInpaintPipeline", **VARIANT}
    (folder / "model_index.json").write_text(json.dumps(index))
    return Backbone.load(folder, "cpu", "float32")


def parts_of(model: Backbone) -> dict[str, Any]:
    return {name: getattr(model, name) for name in StableDiffusion.components}


def channels_of(model: Backbone, clip: Clip, mask: Clip | None, depth: Clip | None) -> Tensor:
    ranks = FrameGroup()
    region = None if mask is None else Region(mask, clip, model.latent_scale)
    shard = ranks.shard([range(len(clip))])
    found = further_channels(model, clip, region, depth, 1, ranks, shard).frames
    assert found is not None
    return found


def ours(model: Backbone, noise: Tensor, channels: Tensor) -> Tensor:
    return sampled(model, noise, 3, "a red ball", "grass", 3.0, channels)


def test_depth_as_the_pipeline(depth_model: Backbone) -> None:
    clip, generator = tiny_clip(FRAMES), torch.Generator().manual_seed(0)
    one = torch.rand(16, 32, generator=generator)
    depth = torch.stack([one, one.flip(-1)])  # of one range, as the pipeline takes each by itself
    noise = torch.randn(FRAMES, 4, 8, 16, generator=generator)
    pipeline = StableDiffusionDepth2ImgPipeline(
        **parts_of(depth_model), depth_estimator=None, feature_extractor=None
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.prepare_latents = lambda *args, **kwargs: noise  # no source
    expected = pipeline(**PROMPTS, image=clip.frames, depth_map=depth, strength=1.0).images
    frames = Clip.from_frames(depth[:, None].repeat(1, 3, 1, 1))
    channels = channels_of(depth_model, clip, None, frames)
    assert channels.shape == (FRAMES, 1, 8, 16)
    found = ours(depth_model, noise, channels)
    assert torch.allclose(found, expected, rtol=0, atol=1e-4)
    assert not torch.allclose(ours(depth_model, noise, -channels), expected, rtol=0, atol=1e-2)


@pytest.mark.parametrize("family", ["1.x", "xl"])
def test_inpainting_as_the_pipeline(painting_model: Backbone, family: str, tmp_path: Path) -> None:
    clip, generator = tiny_clip(FRAMES), torch.Generator().manual_seed(0)
    mask = (torch.rand(FRAMES, 1, 16, 32, generator=generator) > 0.4).float()
    noise = torch.randn(FRAMES, 4, 8, 16, generator=generator)
    if family == "xl":
        model = Backbone.load(with_channels(tmp_path, 9, write_tiny_xl), "cpu", "float32")
        assert isinstance(model, StableDiffusionXL)
        own = {name: getattr(model, name) for name in model.components}
        pipeline: Any = StableDiffusionXLInpaintPipeline(**own, add_watermarker=False)
    else:
        model = painting_model
        pipeline = StableDiffusionInpaintPipeline(
            **parts_of(model), safety_checker=None, feature_extractor=None,
            requires_safety_checker=False,
        )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    hidden = pipeline.mask_processor.preprocess(mask) >= 0.5
    seen = pipeline.image_processor.preprocess(clip.frames) * ~hidden
    with torch.no_grad():  # the posterior's mean, where the pipeline draws from it
        latents = pipeline.vae.encode(seen).latent_dist.mode() * pipeline.vae.config.scaling_factor
    expected = pipeline(
        **PROMPTS, image=clip.frames, mask_image=mask, masked_image_latents=latents, height=16,
        width=32, latents=noise, strength=1.0,
    ).images  # fmt: skip
    frames = Clip.from_frames(mask.repeat(1, 3, 1, 1))
    channels = channels_of(model, clip, frames, None)
    assert channels.shape == (FRAMES, 5, 8, 16)
    found = ours(model, noise, channels)
    assert torch.allclose(found, expected, rtol=0, atol=1e-4)
    swapped = ours(model, noise, channels.flip(0))
    assert not torch.allclose(swapped, expected, rtol=0, atol=1e-2)


@pytest.mark.parametrize(("channels", "kind"), [(4, None), (5, "depth"), (9, "mask")])
def test_what_a_network_takes(backbone: StableDiffusion, channels: int, kind: str | None) -> None:
    unet = UNet2DConditionModel.from_config({**backbone.unet.config, "in_channels": channels})
    model = StableDiffusion(**{**parts_of(backbone), "unet": unet})
    assert (model.further_channels, model.latent_channels) == (kind, 4)


@pytest.mark.parametrize("channels", [3, 7, 8])
def test_another_number_of_channels_is_refused(backbone: StableDiffusion, channels: int) -> None:
    unet = UNet2DConditionModel.from_config({**backbone.unet.config, "in_channels": channels})
    with pytest.raises(ModelError, match=rf"takes {channels} channels .* expected 4, 5 .* or 9 "):
        StableDiffusion(**{**parts_of(backbone), "unet": unet})


def test_a_network_without_what_it_takes(depth_model: Backbone) -> None:
    with pytest.raises(ModelError, match=r"takes the frames' depth .* got no channels"):
        depth_model.predict(torch.zeros(1, 4, 8, 8), 1.0, depth_model.embed([""]))


@pytest.mark.full
def test_the_kit_passes_them(painting_model: Backbone, depth_model: Backbone) -> None:
    for model in (painting_model, depth_model):
        check_backbone(model)
