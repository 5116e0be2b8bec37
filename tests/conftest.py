"""Real but tiny components: a random Stable Diffusion in diffusers' layout, and clips."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before the first import of a hub client

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from tokenflow.diffusion import Backbone
from tokenflow.miniature.tokenizer import MAX_LENGTH, save_tokenizer
from tokenflow.video import Clip

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion with the right shape, few channels and random weights."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    words = len(save_tokenizer(folder / "tokenizer"))
    UNet2DConditionModel(
        sample_size=8,
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


@pytest.fixture(scope="session")
def backbone(model_folder: Path) -> Backbone:
    """The tiny random model, on the CPU in float32."""
    return Backbone.load(model_folder, device="cpu")


@pytest.fixture
def clip() -> Clip:
    """Nine random frames of 16×32 pixels."""
    generator = torch.Generator().manual_seed(1)
    return Clip.from_frames(torch.rand(9, 3, 16, 32, generator=generator))


@pytest.fixture(scope="session")
def real_video() -> Path:
    """A real H.264 clip, where the checkout has one beside it."""
    path = ROOT.parent / "shared" / "data" / "woman-running.mp4"
    if not path.exists():
        pytest.skip("the real clip is not beside this checkout")
    return path
