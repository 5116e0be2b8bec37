"""The miniature's networks before training, in the shape of Stable Diffusion's."""

from __future__ import annotations

from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from tokenflow.miniature.scenes import SIZE
from tokenflow.miniature.tokenizer import MAX_LENGTH


def new_vae() -> AutoencoderKL:
    """0.9 M parameters, 4 times downsampling, 4 latent channels."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64),
        norm_num_groups=16,
        sample_size=SIZE,
        mid_block_add_attention=False,
    )


def new_unet() -> UNet2DConditionModel:
    """7 M parameters in the shape of Stable Diffusion's UNet: four levels of two layers."""
    return UNet2DConditionModel(
        sample_size=SIZE // 4,
        block_out_channels=(32, 64, 96, 128),
        cross_attention_dim=128,
        attention_head_dim=(1, 2, 3, 4),  # diffusers reads these as numbers of heads
        norm_num_groups=16,
        use_linear_projection=True,
    )


def new_text_encoder(vocabulary: int) -> CLIPTextModel:
    """0.3 M parameters; the two special tokens come last in the vocabulary."""
    return CLIPTextModel(text_config(vocabulary, 128))


def new_projected_text_encoder(vocabulary: int, width: int) -> CLIPTextModelWithProjection:
    """One of Stable Diffusion 3's two encoders: a `new_text_encoder` that pools the prompt too."""
    return CLIPTextModelWithProjection(text_config(vocabulary, width))


def text_config(vocabulary: int, width: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )


def new_transformer(blocks: int = 6) -> SD3Transformer2DModel:
    """7.8 M parameters with six blocks of width 192, on patches of 2x2 latent pixels.

    The weights begin as those of DiT do (Peebles & Xie 2023): no block changes its input.
    """
    network = SD3Transformer2DModel(
        sample_size=SIZE // 4,
        pos_embed_max_size=SIZE // 8,
        in_channels=4,
        out_channels=4,
        num_layers=blocks,
        num_attention_heads=6,
        attention_head_dim=32,
        caption_projection_dim=192,
        joint_attention_dim=192,
        pooled_projection_dim=192,
        qk_norm="rms_norm",
    )
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear):
            if "norm" in name or name == "proj_out":
                nn.init.zeros_(module.weight)
            else:
                nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    return network


def new_flow_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Stable Diffusion 3's, with a shift for fewer latent pixels."""
    return FlowMatchEulerDiscreteScheduler(shift=2.0)


def new_scheduler() -> DDIMScheduler:
    """Stable Diffusion's, but noisier at its end.

    The latents have a quarter of Stable Diffusion's pixels, so their mean colour survives noise
    that would hide it there; were it still to be read from the noisiest latents, the text encoder
    would not learn to say it.
    """
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.018,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def new_controlnet(unet: UNet2DConditionModel) -> ControlNetModel:
    """3.1 M parameters: a copy of the UNet's encoder, and an embedding that halves twice."""
    return ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 32, 64))


def new_consistency_unet(teacher: UNet2DConditionModel) -> UNet2DConditionModel:
    """The teacher with an embedding of the scale of guidance, which at first changes nothing."""
    network = UNet2DConditionModel.from_config(teacher.config, time_cond_proj_dim=64)
    nn.init.zeros_(network.time_embedding.cond_proj.weight)
    network.load_state_dict(teacher.state_dict(), strict=False)
    return network


def new_consistency_scheduler() -> LCMScheduler:
    """Of the UNet's noise schedule, in 50 intervals."""
    return LCMScheduler.from_config(new_scheduler().config, original_inference_steps=50)
