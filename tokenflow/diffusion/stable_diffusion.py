"""Stable Diffusion 1.x and 2.x."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from tokenflow.diffusion.clip import CLIPText
from tokenflow.diffusion.conditioning import Conditioning
from tokenflow.diffusion.unet import UNetBackbone, decoder_layers


class StableDiffusion(UNetBackbone):
    """Stable Diffusion 1.x and 2.x: UNet, VAE, one text encoder.

    Source: Rombach et al. 2022 (arXiv 2112.10752).
    """

    title = "Stable Diffusion 1.x or 2.x"
    components: ClassVar = {
        "unet": UNet2DConditionModel,
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModel,
        "tokenizer": CLIPTokenizer,
        "scheduler": DDIMScheduler,
    }

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        scheduler: DDIMScheduler,
    ) -> None:
        super().__init__(unet, vae, [CLIPText(text_encoder, tokenizer)], scheduler)
        self.text_encoder, self.tokenizer = text_encoder, tokenizer

    def embed(self, prompts: Sequence[str]) -> Conditioning:
        """The text encoder's last hidden state as "embeddings", (prompts, tokens, width)."""
        (text,) = self.clips
        return self.conditioning(embeddings=text.encode(prompts).last_hidden_state)

    def decoder(self) -> Sequence[tuple[str, list[str]]]:
        """From a third of the way up: of twelve, the paper's 4 to 11."""
        layers = decoder_layers(self.unet)
        return layers[len(layers) // 3 :]
