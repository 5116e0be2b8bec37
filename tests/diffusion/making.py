"""Tiny models of other families than `tokenflow.testing`'s, and plain sampling, for tests."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from tokenflow.diffusion import Backbone, Source, StableDiffusionXL, Trajectory
from tokenflow.diffusion.unet import UNetBackbone
from tokenflow.editors import Editor, Prompts, Step
from tokenflow.engine import Settings, edit_latents
from tokenflow.propagation import NNField
from tokenflow.testing import write_tiny_model

CHANNELS = (4, 8)  # one halving, as the tiny VAE has


def make_controlnet(
    folder: Path, unet: UNet2DConditionModel, seed: int = 0, **changes: Any
) -> Path:
    """A copy of the UNet's encoder whose zero convolutions are random; `changes` of its config."""
    torch.manual_seed(seed)
    network = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=CHANNELS)
    if changes:
        network = ControlNetModel.from_config({**network.config, **changes})
    zero = [
        network.controlnet_cond_embedding.conv_out,
        network.controlnet_mid_block,
        *network.controlnet_down_blocks,
    ]
    for module in zero:
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    network.save_pretrained(folder)
    return folder


def write_tiny_xl(folder: Path) -> Path:
    """An SDXL in diffusers' layout: two text encoders of different width, random weights."""
    write_tiny_model(folder)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 1, 2),
            cross_attention_dim=16 + 24,
            attention_head_dim=(1, 2, 2),
            norm_num_groups=4,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 12,
        ).save_pretrained(folder / "unet")
        config = CLIPTextConfig.from_pretrained(folder / "text_encoder", num_hidden_layers=2)
        CLIPTextModel(config).save_pretrained(folder / "text_encoder")
        config.update({"hidden_size": 24, "projection_dim": 12, "hidden_act": "gelu"})
        CLIPTextModelWithProjection(config).save_pretrained(folder / "text_encoder_2")
    shutil.copytree(folder / "tokenizer", folder / "tokenizer_2")
    index = {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def with_unet(
    folder: Path, write: Callable[[Path], Path] = write_tiny_model, **changes: Any
) -> Path:
    """A tiny Stable Diffusion, or what else is written, whose UNet's configuration is changed."""
    write(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = UNet2DConditionModel.load_config(folder / "unet")
        UNet2DConditionModel.from_config({**config, **changes}).save_pretrained(folder / "unet")
    return folder


def with_channels(
    folder: Path, channels: int, write: Callable[[Path], Path] = write_tiny_model
) -> Path:
    """The same, whose UNet takes so many channels."""
    return with_unet(folder, write, in_channels=channels)


class Plain(Editor):
    """No editor: every branch takes the edited latents."""

    inverts = False

    def inputs(self, x: Tensor, step: Step, source: Source) -> Tensor:
        return x.repeat(len(step.branches), 1, 1, 1, 1)


def sampled(
    model: Backbone,
    noise: Tensor,
    steps: int,
    prompt: str,
    negative_prompt: str = "",
    guidance: float = 1.0,
    channels: Tensor | None = None,
) -> Tensor:
    """Every frame by itself, from noise to latents, by the engine."""
    schedule = model.schedule(steps)
    return edit_latents(
        model, Trajectory.empty(noise, schedule, None), schedule,
        Prompts(prompt, negative_prompt), Plain(), NNField(),
        Settings(steps=steps, guidance=guidance, consistency="none"), channels=channels, x=noise,
    )  # fmt: skip


def pipeline_of(model: UNetBackbone, **parts: Any) -> Any:
    """diffusers' own pipeline with a model's parts, or others."""
    own = {name: parts.get(name, getattr(model, name)) for name in model.components}
    if isinstance(model, StableDiffusionXL):
        own |= {"force_zeros_for_empty_prompt": model.zero_empty_prompt, "add_watermarker": False}
        made = StableDiffusionXLPipeline(**own)
    else:
        own |= {"safety_checker": None, "feature_extractor": None}
        made = StableDiffusionPipeline(**own, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made
