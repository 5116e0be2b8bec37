"""SDXL, and what was distilled from it: Turbo, Lightning."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from tokenflow.diffusion.backbone import INDEX, Defaults
from tokenflow.diffusion.clip import CLIPText
from tokenflow.diffusion.conditioning import Conditioning
from tokenflow.diffusion.loading import ModelError, load_pretrained
from tokenflow.diffusion.unet import UNetBackbone, decoder_layers
from tokenflow.storage import digests

SIZES = 6
"""Numbers of an image that the UNet embeds: original size, crop, target size."""


class StableDiffusionXL(UNetBackbone):
    """SDXL: UNet, VAE, two text encoders, of which the second also gives a pooled embedding.

    The sizes and the crop that the UNet embeds are those of whole images of the frames' size. In
    float16 a VAE whose configuration says `force_upcast` computes in float32, as it would overflow.

    Args:
        zero_empty_prompt: Whether the embeddings of an empty prompt are zeros, as in training:
            `force_zeros_for_empty_prompt` of the model's index.

    Source: Podell et al. 2023 (arXiv 2307.01952).
    """

    title = "SDXL"
    components: ClassVar = {
        "unet": UNet2DConditionModel,
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModel,
        "text_encoder_2": CLIPTextModelWithProjection,
        "tokenizer": CLIPTokenizer,
        "tokenizer_2": CLIPTokenizer,
        "scheduler": DDIMScheduler,
    }
    taken: ClassVar = {"addition_embed_type": "text_time"}
    family_defaults = Defaults(guidance=5.0)

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        text_encoder_2: CLIPTextModelWithProjection,
        tokenizer: CLIPTokenizer,
        tokenizer_2: CLIPTokenizer,
        scheduler: DDIMScheduler,
        zero_empty_prompt: bool = True,
    ) -> None:
        texts = CLIPText(text_encoder, tokenizer), CLIPText(text_encoder_2, tokenizer_2)
        super().__init__(unet, vae, texts, scheduler)
        pooled, width = text_encoder_2.config.projection_dim, unet.config.addition_time_embed_dim
        taken = unet.config.projection_class_embeddings_input_dim
        if taken != pooled + SIZES * width:
            raise ModelError(
                f"the UNet takes {taken} further channels, and {pooled} of the second text "
                f"encoder's pooled embedding and {SIZES} x {width} of sizes are {pooled} + "
                f"{SIZES * width}; expected parts of one SDXL base, not of several models or a "
                f"refiner"
            )
        self.text_encoder, self.text_encoder_2 = text_encoder, text_encoder_2
        self.tokenizer, self.tokenizer_2 = tokenizer, tokenizer_2
        self.zero_empty_prompt = zero_empty_prompt

    def checked_vae(self, vae: AutoencoderKL) -> AutoencoderKL:
        upcast = vae.config.force_upcast and vae.dtype == torch.float16
        return super().checked_vae(vae.float() if upcast else vae)

    @classmethod
    def load_parts(cls, model: str, dtype: torch.dtype) -> dict[str, Any]:
        parts = super().load_parts(model, dtype)
        if Path(model).exists() and not (Path(model) / INDEX).exists():
            return parts
        index = load_pretrained(DiffusionPipeline.load_config, model, INDEX, INDEX)
        return {**parts, "zero_empty_prompt": bool(index.get("force_zeros_for_empty_prompt", True))}

    @cached_property
    def fingerprint(self) -> str:
        return digests.of_values(super().fingerprint, self.zero_empty_prompt)

    @torch.no_grad()
    def embed(self, prompts: Sequence[str]) -> Conditioning:
        """Both text encoders' last hidden states but one as "embeddings", (prompts, tokens, width),
        and the second one's "pooled" embedding, (prompts, width).
        """
        outputs = [text.encode(prompts, output_hidden_states=True) for text in self.clips]
        embeddings = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        pooled = outputs[-1].text_embeds
        if self.zero_empty_prompt:
            words = torch.tensor([bool(prompt) for prompt in prompts], device=self.device)
            embeddings, pooled = embeddings * words[:, None, None], pooled * words[:, None]
        return self.conditioning(embeddings=embeddings, pooled=pooled)

    def arguments(
        self, conditioning: Conditioning, latents: Float[Tensor, "n c h w"]
    ) -> dict[str, Any]:
        height, width = (self.latent_scale * side for side in latents.shape[-2:])
        pooled, sizes = conditioning["pooled"], (height, width, 0, 0, height, width)
        # one by one: a list would be sent to an accelerator, and waited for
        columns = [pooled.new_full((len(pooled), 1), size) for size in sizes]
        added = {"text_embeds": pooled, "time_ids": torch.cat(columns, dim=1)}
        return {**super().arguments(conditioning, latents), "added_cond_kwargs": added}

    def decoder(self) -> Sequence[tuple[str, list[str]]]:
        """From the second of nine up, at a quarter of the latents' size as the paper's layer 4."""
        return decoder_layers(self.unet)[1:]
