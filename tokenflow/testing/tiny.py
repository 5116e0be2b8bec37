"""Real but tiny components: a Stable Diffusion with random weights, and a clip."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from tokenflow.diffusion import Backbone
from tokenflow.miniature.tokenizer import MAX_LENGTH, save_tokenizer
from tokenflow.video import Clip


def write_tiny_model(folder: Path) -> Path:
    """A Stable Diffusion in diffusers' layout: the right shape, few channels, random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        words = len(save_tokenizer(folder / "tokenizer"))
        UNet2DConditionModel(
            sample_size=8,
            layers_per_block=1,
            block_out_channels=(8, 8, 16, 16),
            cross_attention_dim=16,
            attention_head_dim=(1, 1, 2, 2),
            norm_num_groups=4,
            use_linear_projection=True,
        ).save_pretrained(folder / "unet")
        AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            sample_size=16,
            mid_block_add_attention=False,
            scaling_factor=1.0,
        ).save_pretrained(folder / "vae")
        CLIPTextModel(
            CLIPTextConfig(
                vocab_size=words,
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=MAX_LENGTH,
                bos_token_id=words - 2,
                eos_token_id=words - 1,
            )
        ).save_pretrained(folder / "text_encoder")
    DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    ).save_pretrained(folder / "scheduler")
    return folder


@cache
def loaded() -> Backbone:
    with TemporaryDirectory() as folder:
        return Backbone.load(write_tiny_model(Path(folder)), "cpu", "float32")


def tiny_backbone() -> Backbone:
    """A random model on the CPU in float32, a new one at each call; latents are half as wide."""
    return copy.deepcopy(loaded())


def tiny_clip(frames: int = 5, height: int = 16, width: int = 32) -> Clip:
    """Random frames, always the same; sides in pixels, multiples of 16 for the tiny model."""
    generator = torch.Generator().manual_seed(1)
    return Clip.from_frames(torch.rand(frames, 3, height, width, generator=generator))
