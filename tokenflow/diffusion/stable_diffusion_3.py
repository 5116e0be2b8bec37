"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers.loaders import SD3LoraLoaderMixin
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from tokenflow.diffusion.backbone import Defaults
from tokenflow.diffusion.clip import CLIPText
from tokenflow.diffusion.conditioning import Conditioning
from tokenflow.diffusion.flow_transformer import FlowTransformer
from tokenflow.diffusion.schedule import Schedule, Timestep
from tokenflow.diffusion.sites import DiffusersSite, StableDiffusion3Site
from tokenflow.diffusion.t5 import T5Text

T5_TOKENS = 256
"""Of a prompt, as in diffusers' pipeline."""


class StableDiffusion3(FlowTransformer):
    """Stable Diffusion 3 and 3.5: transformer, VAE, two CLIP text encoders and T5.

    Without T5, zeros stand in place of its embeddings.

    Source: Esser et al. 2024 (arXiv 2403.03206).
    """

    title = "Stable Diffusion 3"
    components: ClassVar[Mapping[str, Any]] = {
        "transformer": SD3Transformer2DModel,
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModelWithProjection,
        "text_encoder_2": CLIPTextModelWithProjection,
        "text_encoder_3": T5EncoderModel,
        "tokenizer": CLIPTokenizer,
        "tokenizer_2": CLIPTokenizer,
        "tokenizer_3": T5Tokenizer,
        "scheduler": FlowMatchEulerDiscreteScheduler,
    }
    lora_loader = SD3LoraLoaderMixin
    optional = frozenset({"text_encoder_3", "tokenizer_3"})
    given = frozenset({"hidden_states", "encoder_hidden_states", "pooled_projections", "timestep"})

    def __init__(
        self,
        transformer: SD3Transformer2DModel,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModelWithProjection,
        text_encoder_2: CLIPTextModelWithProjection,
        tokenizer: CLIPTokenizer,
        tokenizer_2: CLIPTokenizer,
        scheduler: FlowMatchEulerDiscreteScheduler,
        text_encoder_3: T5EncoderModel | None = None,
        tokenizer_3: T5Tokenizer | None = None,
    ) -> None:
        self.clips = CLIPText(text_encoder, tokenizer), CLIPText(text_encoder_2, tokenizer_2)
        self.t5: T5Text | None = None
        if text_encoder_3 is not None and tokenizer_3 is not None:
            self.t5 = T5Text(text_encoder_3, tokenizer_3, T5_TOKENS)
        texts = self.clips if self.t5 is None else (*self.clips, self.t5)
        super().__init__(transformer, vae, texts, scheduler)
        config = transformer.config
        pooled = sum(text.encoder.config.projection_dim for text in self.clips)
        width = config.joint_attention_dim
        self.check_widths(**{
            "pooled embeddings": (config.pooled_projection_dim, pooled),
            "embeddings": (width, width if self.t5 is None else self.t5.width),
        })  # fmt: skip
        if (clip := sum(text.width for text in self.clips)) > width:
            self.check_widths(embeddings=(width, clip))

    @classmethod
    def defaults_of(cls, config: Mapping[str, Any]) -> Defaults:
        return Defaults(guidance=7.0, features=0.0)

    @property
    def latent_channels(self) -> int:
        return int(self.transformer.config.in_channels)

    @property
    def multiple(self) -> int:
        return int(self.latent_scale * self.transformer.config.patch_size)

    @property
    def size(self) -> int:
        return int(self.transformer.config.sample_size)

    @property
    def largest(self) -> int:
        """The table of positions, from whose centre those of a frame are taken."""
        return int(self.multiple * self.transformer.config.pos_embed_max_size)

    def schedule(self, steps: int, size: tuple[int, int] | None = None) -> Schedule:
        height, width = size or (self.size, self.size)
        patch = self.transformer.config.patch_size
        return Schedule.from_flow(self.scheduler, steps, (height // patch) * (width // patch))

    @torch.no_grad()
    def embed(self, prompts: Sequence[str]) -> Conditioning:
        """Both CLIP encoders' last hidden states but one beside each other, filled up with zeros,
        and then T5's, as "embeddings", (prompts, tokens, width); "pooled", (prompts, width).
        """
        width = self.transformer.config.joint_attention_dim
        outputs = [text.encode(prompts, output_hidden_states=True) for text in self.clips]
        clip = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        clip = pad(clip, (0, width - clip.shape[-1]))
        if self.t5 is None:
            t5 = clip.new_zeros(len(prompts), T5_TOKENS, width)
        else:
            t5 = self.t5.encode(prompts).to(clip.dtype)
        pooled = torch.cat([output.text_embeds for output in outputs], dim=-1)
        return Conditioning(embeddings=torch.cat([clip, t5], dim=1), pooled=pooled)

    def predict(
        self,
        latents: Float[Tensor, "n c h w"],
        t: Timestep,
        conditioning: Conditioning,
        **inputs: Any,
    ) -> Float[Tensor, "n c h w"]:
        output = self.transformer(
            latents.to(self.device, self.dtype),
            encoder_hidden_states=conditioning["embeddings"],
            pooled_projections=conditioning["pooled"],
            timestep=torch.full((1,), t, device=self.device),  # a number would be waited for
            **inputs,
        )
        return output.sample.float()

    def sites(self) -> Mapping[str, DiffusersSite]:
        """Joint attention, and in SD 3.5's first blocks another one of image tokens alone.

        Positions are added to the tokens at the network's input. In the first half of the blocks
        of the embedded transformer they are most of what a token is, which is matched to its own
        place (docs/miniature.md); larger models were not measured.
        """
        found: dict[str, DiffusersSite] = {}
        blocks = self.transformer.transformer_blocks
        for number, block in enumerate(blocks):
            name = f"transformer_blocks.{number}"
            here: list[DiffusersSite] = [StableDiffusion3Site(f"{name}.attn", block.attn)]
            if block.attn2 is not None:
                here.append(DiffusersSite(f"{name}.attn2", block.attn2))
            for site in here:
                site.matched = number >= len(blocks) // 2
                found[site.name] = site
        return found
