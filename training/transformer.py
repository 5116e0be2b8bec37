"""Training of the flow-matching transformer, in the shape of Stable Diffusion 3."""

from __future__ import annotations

import math

import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.attention_processor import Attention
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad
from transformers import CLIPTextModelWithProjection

from training.modules import TrainingModule

PADDING = 256  # tokens of zeros that StableDiffusion3Pipeline appends in place of its T5's
OBJECT = 4.0
"""How much more an error near the object counts."""
HIDDEN = 0.95
"""Noise level from which it does not."""


class FlowTraining(TrainingModule):
    """Stage `transformer`: transformer and text encoders predict the flow from latents to noise.

    Rectified flow with logit-normal noise levels (Esser et al. 2024, arXiv 2403.03206).
    """

    def __init__(
        self,
        transformer: SD3Transformer2DModel,
        text_encoders: tuple[CLIPTextModelWithProjection, CLIPTextModelWithProjection],
        nothing: Int[Tensor, " length"],
    ) -> None:
        super().__init__(rate=1e-3)
        self.transformer = transformer
        self.transformer.set_attn_processor(PaddingAsOneToken())
        self.transformer.pos_embed.cropped_pos_embed = self.positions
        self.corner = (0, 0)
        self.text_encoder, self.text_encoder_2 = text_encoders
        self.nothing: Tensor
        self.register_buffer("nothing", nothing, persistent=False)

    def loss(
        self,
        latents: Float[Tensor, "batch 4 height width"],
        tokens: Int[Tensor, "batch length"],
        near: Float[Tensor, "batch 1 height width"],
    ) -> Tensor:
        latents, near = self.crop(latents, near)
        dropped = torch.rand(len(tokens), 1, device=tokens.device) < 0.1
        text, pooled = self.embedded(torch.where(dropped, self.nothing, tokens))
        # more of the noisy levels than the paper's: there the prompt decides hue and layout
        sigma = (0.4 + 1.2 * torch.randn(len(latents), device=latents.device)).sigmoid()
        # noise with a random mean hides the hue for longer, so that it is learnt from the prompt
        noise = torch.randn_like(latents)
        noise = noise + 0.1 * torch.randn(*noise.shape[:2], 1, 1, device=noise.device)
        level = sigma[:, None, None, None]
        x = latents.lerp(noise, level)
        predicted = self.transformer(x, text, pooled, 1000 * sigma).sample.float()
        error = (predicted - (noise - latents)).square()
        # backgrounds are most of a picture, and outlines are harder; not in noise that hides where
        # the object is, or it would be seen everywhere
        known = ((HIDDEN - level) / 0.15).clamp(0, 1)
        return (error * (1 + OBJECT * near * known)).mean()

    def crop(self, latents: Float[Tensor, "batch 4 height width"], *more: Tensor) -> list[Tensor]:
        """A random 3/4 of the side at half the cost, less and less often; else all."""
        if torch.rand(()) < self.global_step / self.trainer.max_steps:
            self.corner = (0, 0)
            return [latents, *more]
        patch, side = self.transformer.config.patch_size, latents.shape[-1] * 3 // 4
        places = (latents.shape[-1] - side) // patch + 1
        self.corner = top, left = tuple(torch.randint(places, (2,)).tolist())
        return [x[..., patch * top :, patch * left :][..., :side, :side] for x in (latents, *more)]

    def positions(self, height: int, width: int) -> Tensor:
        """The position embeddings of a crop of (height, width) latent pixels, from its place."""
        embed = self.transformer.pos_embed
        rows, columns = (
            slice(a, a + n // embed.patch_size)
            for a, n in zip(self.corner, (height, width), strict=True)
        )
        grid = embed.pos_embed.unflatten(1, (embed.pos_embed_max_size, -1))
        return grid[:, rows, columns].flatten(1, 2)

    def embedded(self, tokens: Int[Tensor, "batch length"]) -> tuple[Tensor, Tensor]:
        """What StableDiffusion3Pipeline gives the transformer without a T5, its padding as one.

        Token embeddings (batch, length + 1, width) and pooled embeddings (batch, width).
        """
        outputs = [
            encoder(tokens, output_hidden_states=True)
            for encoder in (self.text_encoder, self.text_encoder_2)
        ]
        text = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        width = self.transformer.config.joint_attention_dim
        text = pad(text, (0, width - text.shape[-1], 0, 1))
        return text, torch.cat([output.text_embeds for output in outputs], dim=-1)


class PaddingAsOneToken:
    """Joint attention in which the last text token stands for `PADDING` equal ones.

    Text tokens have no positions, so equal ones stay equal through all blocks: as keys, n of them
    are one whose logit is greater by log n. This halves the cost of training.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Float[Tensor, "batch pixels width"],
        encoder_hidden_states: Float[Tensor, "batch words width"],
        attention_mask: None = None,
    ) -> tuple[Tensor, Tensor]:
        parts = [
            (hidden_states, attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k),
            (
                encoder_hidden_states,
                attn.add_q_proj,
                attn.add_k_proj,
                attn.add_v_proj,
                attn.norm_added_q,
                attn.norm_added_k,
            ),
        ]
        queries, keys, values = [], [], []
        for states, to_query, to_key, to_value, norm_query, norm_key in parts:
            query, key, value = (
                project(states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
                for project in (to_query, to_key, to_value)
            )
            queries.append(norm_query(query))
            keys.append(norm_key(key))
            values.append(value)
        query, key, value = (torch.cat(x, dim=2) for x in (queries, keys, values))
        logits = (query / math.sqrt(query.shape[-1])) @ key.transpose(-1, -2)
        bias = torch.zeros(key.shape[2], dtype=logits.dtype, device=logits.device)
        bias[-1] = math.log(PADDING)
        # by hand: on processors, the backward pass of PyTorch's fused attention is slower
        attended = (logits + bias).softmax(dim=-1).to(value.dtype) @ value
        image, text = (
            attended.transpose(1, 2)
            .flatten(2)
            .split((hidden_states.shape[1], encoder_hidden_states.shape[1]), dim=1)
        )
        return attn.to_out[0](image), text if attn.context_pre_only else attn.to_add_out(text)
