"""The miniature's networks before training, in the shape of Stable Diffusion's."""

from __future__ import annotations

from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

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
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_LENGTH,
            bos_token_id=vocabulary - 2,
            eos_token_id=vocabulary - 1,
            pad_token_id=vocabulary - 1,
        )
    )


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
