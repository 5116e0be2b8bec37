"""Flux: dev and schnell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from diffusers.loaders import FluxLoraLoaderMixin
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from tokenflow.diffusion.backbone import Defaults
from tokenflow.diffusion.clip import CLIPText
from tokenflow.diffusion.conditioning import Conditioning
from tokenflow.diffusion.flow_transformer import FlowTransformer
from tokenflow.diffusion.schedule import Schedule, Timestep
from tokenflow.diffusion.sites import FluxSingleSite, FluxSite
from tokenflow.diffusion.t5 import T5Text
from tokenflow.diffusion.textual_inversion import Embedding, add

PATCH = 2
"""Sides of the patches of latents that are the network's tokens."""
SIZE = 128
"""Of the images that diffusers' pipeline makes, in latent pixels; the network does not say."""
T5_TOKENS = 512
"""Of a prompt, as in diffusers' pipeline."""


class Flux(FlowTransformer):
    """Flux: transformer, VAE, CLIP's pooled embedding and T5.

    Flux dev embeds the scale of guidance; schnell needs none.

    Source: Black Forest Labs 2024 (https://github.com/black-forest-labs/flux).
    """

    title = "Flux"
    half = torch.bfloat16  # in float16 diffusers has to clip its residuals
    components: ClassVar[Mapping[str, Any]] = {
        "transformer": FluxTransformer2DModel,
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModel,
        "text_encoder_2": T5EncoderModel,
        "tokenizer": CLIPTokenizer,
        "tokenizer_2": T5Tokenizer,
        "scheduler": FlowMatchEulerDiscreteScheduler,
    }
    lora_loader = FluxLoraLoaderMixin
    given = frozenset({
        "hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "img_ids",
        "txt_ids", "guidance",
    })  # fmt: skip

    def __init__(
        self,
        transformer: FluxTransformer2DModel,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        text_encoder_2: T5EncoderModel,
        tokenizer: CLIPTokenizer,
        tokenizer_2: T5Tokenizer,
        scheduler: FlowMatchEulerDiscreteScheduler,
    ) -> None:
        self.clip = CLIPText(text_encoder, tokenizer)
        self.t5 = T5Text(text_encoder_2, tokenizer_2, T5_TOKENS)
        self.embeds_guidance = bool(transformer.config.guidance_embeds)
        self.text_tokens = T5_TOKENS
        super().__init__(transformer, vae, [self.clip, self.t5], scheduler)
        config = transformer.config
        self.check_widths(**{
            "pooled embeddings": (config.pooled_projection_dim, self.clip.width),
            "embeddings": (config.joint_attention_dim, self.t5.width),
        })  # fmt: skip

    @classmethod
    def defaults_of(cls, config: Mapping[str, Any]) -> Defaults:
        return Defaults(guidance=3.5 if config["guidance_embeds"] else 1.0, features=0.0)

    def add_embeddings(self, embeddings: Sequence[Embedding]) -> None:
        """As in diffusers' pipeline CLIP, not T5, learns the words."""
        add(embeddings, [self.clip], self.title)
        self.forget_fingerprint()

    @property
    def latent_channels(self) -> int:
        return int(self.transformer.config.in_channels) // PATCH**2

    @property
    def multiple(self) -> int:
        return self.latent_scale * PATCH

    @property
    def size(self) -> int:
        return SIZE

    def schedule(self, steps: int, size: tuple[int, int] | None = None) -> Schedule:
        height, width = size or (self.size, self.size)
        tokens = (height // PATCH) * (width // PATCH)
        # not the scheduler's own ends: its last level would be nearer to the clean latent
        sigmas = np.linspace(1.0, 1 / max(steps, 1), max(steps, 1)).tolist()
        return Schedule.from_flow(self.scheduler, steps, tokens, sigmas)

    @torch.no_grad()
    def embed(self, prompts: Sequence[str]) -> Conditioning:
        """T5's last hidden state as "embeddings", (prompts, tokens, width), CLIP's "pooled"
        embedding, (prompts, width), and where the network embeds it, a "guidance" of 1, (prompts).
        """
        pooled = self.clip.encode(prompts).pooler_output
        tensors = {"embeddings": self.t5.encode(prompts).to(pooled.dtype), "pooled": pooled}
        if self.embeds_guidance:
            tensors["guidance"] = torch.ones(len(prompts), device=self.device)
        return Conditioning(**tensors)

    def predict(
        self,
        latents: Float[Tensor, "n c h w"],
        t: Timestep,
        conditioning: Conditioning,
        **inputs: Any,
    ) -> Float[Tensor, "n c h w"]:
        tokens = rearrange(latents, "n c (h p) (w q) -> n (h w) (c p q)", p=PATCH, q=PATCH)
        height = latents.shape[2] // PATCH
        positions = self.positions(height, latents.shape[3] // PATCH)
        embeddings = conditioning["embeddings"]
        self.text_tokens = embeddings.shape[1]
        output = self.transformer(
            tokens.to(self.device, self.dtype),
            encoder_hidden_states=embeddings,
            pooled_projections=conditioning["pooled"],
            timestep=torch.full((1,), t / 1000, device=self.device),  # a number would be waited for
            img_ids=positions,
            txt_ids=positions.new_zeros(self.text_tokens, 3),
            guidance=conditioning["guidance"] if self.embeds_guidance else None,
            **inputs,
        )
        patches = "n (h w) (c p q) -> n c (h p) (w q)"
        return rearrange(output.sample, patches, h=height, p=PATCH, q=PATCH).float()

    def positions(self, height: int, width: int) -> Float[Tensor, "tokens 3"]:
        """Of image tokens, row by row: 0, the row, the column."""
        rows, columns = (torch.arange(n, device=self.device) for n in (height, width))
        grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)
        return torch.nn.functional.pad(grid.flatten(0, 1), (1, 0)).float()

    def sites(self) -> Mapping[str, FluxSite]:
        """Of double blocks, then of single ones, in which text and image are one sequence."""
        double = enumerate(self.transformer.transformer_blocks)
        found = {f"transformer_blocks.{number}.attn": block.attn for number, block in double}
        single = enumerate(self.transformer.single_transformer_blocks)
        sites = {name: FluxSite(name, layer) for name, layer in found.items()}
        for number, block in single:
            name = f"single_transformer_blocks.{number}.attn"
            sites[name] = FluxSingleSite(name, block.attn, lambda: self.text_tokens)
        return sites
