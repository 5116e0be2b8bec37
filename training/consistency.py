"""Distillation of the miniature to a few steps: a latent consistency model (arXiv 2310.04378)."""

from __future__ import annotations

import math

import torch
from diffusers import LCMScheduler, UNet2DConditionModel
from jaxtyping import Float, Int
from torch import Tensor
from transformers import CLIPTextModel

from training.modules import NoisePrediction
from training.networks import new_consistency_unet

GUIDANCE = (1.0, 5.0)  # the range of scales that the distilled network embeds
HUBER = 1e-3


class ConsistencyDistillation(NoisePrediction):
    """Stage `lcm`: a UNet predicts where the guided teacher's sampling ends, from every timestep.

    Luo et al. 2023, algorithm 1, with the network itself as target instead of its average (Song
    and Dhariwal 2023, section 3.2).
    """

    def __init__(
        self,
        teacher: UNet2DConditionModel,
        text_encoder: CLIPTextModel,
        nothing: Int[Tensor, " length"],
        scheduler: LCMScheduler,
    ) -> None:
        super().__init__(rate=3e-4)
        self.unet = new_consistency_unet(teacher).to(memory_format=torch.channels_last)
        self.teacher = teacher.requires_grad_(False).to(memory_format=torch.channels_last)
        self.text_encoder = text_encoder.requires_grad_(False)
        self.scheduler = scheduler
        self.nothing: Tensor
        self.register_buffer("nothing", nothing, persistent=False)

    def loss(
        self, latents: Float[Tensor, "batch 4 height width"], tokens: Int[Tensor, "batch length"]
    ) -> Tensor:
        (latents,) = self.crop(latents)
        text = self.text_encoder(tokens)[0]
        nothing = self.text_encoder(self.nothing[None])[0]
        intervals = self.scheduler.config.original_inference_steps
        skipped = self.scheduler.config.num_train_timesteps // intervals
        t = skipped * torch.randint(1, intervals + 1, (len(latents),), device=latents.device) - 1
        low, high = GUIDANCE
        guidance = low + (high - low) * torch.rand(len(latents), device=latents.device)
        noise = torch.randn_like(latents)
        x = self.mixed(latents, noise, t)
        with torch.no_grad():
            earlier = (t - skipped).clamp(min=0)
            target = self.clean(
                self.teacher_step(x, t, earlier, text, nothing, guidance), earlier, text, guidance
            )
        error = self.clean(x, t, text, guidance) - target
        return ((error.square() + HUBER**2).sqrt() - HUBER).mean()

    def mixed(self, latents: Tensor, noise: Tensor, t: Int[Tensor, " batch"]) -> Tensor:
        """Latents at timesteps `t`, given what is clean in them and what is noise."""
        a = self.alphas[t][:, None, None, None]
        return a.sqrt() * latents + (1 - a).sqrt() * noise

    def split(self, x: Tensor, noise: Tensor, t: Int[Tensor, " batch"]) -> Tensor:
        """What is clean in `x`, given what is noise in it."""
        a = self.alphas[t][:, None, None, None]
        return (x - (1 - a).sqrt() * noise) / a.sqrt()

    def teacher_step(
        self,
        x: Float[Tensor, "batch 4 height width"],
        t: Int[Tensor, " batch"],
        earlier: Int[Tensor, " batch"],
        text: Float[Tensor, "batch length channels"],
        nothing: Float[Tensor, "1 length channels"],
        guidance: Float[Tensor, " batch"],
    ) -> Tensor:
        """One DDIM step of the teacher with classifier-free guidance."""
        prompts = torch.cat([text, nothing.expand_as(text)])
        predicted = self.teacher(torch.cat([x, x]), torch.cat([t, t]), prompts).sample.float()
        prompted, unprompted = predicted.chunk(2)
        noise = unprompted + guidance[:, None, None, None] * (prompted - unprompted)
        return self.mixed(self.split(x, noise, t), noise, earlier)

    def clean(
        self,
        x: Float[Tensor, "batch 4 height width"],
        t: Int[Tensor, " batch"],
        text: Float[Tensor, "batch length channels"],
        guidance: Float[Tensor, " batch"],
    ) -> Tensor:
        """The consistency function: what the network predicts, and at timestep 0 `x` itself."""
        scale = embedded_guidance(guidance, self.unet.config.time_cond_proj_dim)
        noise = self.unet(x, t, text, timestep_cond=scale).sample.float()
        skip, out = self.scheduler.get_scalings_for_boundary_condition_discrete(
            t[:, None, None, None]
        )
        return skip * x + out * self.split(x, noise, t)


def embedded_guidance(
    guidance: Float[Tensor, " batch"], width: int
) -> Float[Tensor, "batch width"]:
    """As LatentConsistencyModelPipeline embeds a scale of guidance."""
    half = width // 2
    exponents = torch.arange(half, device=guidance.device) * -(math.log(10_000) / (half - 1))
    angles = ((guidance - 1) * 1000)[:, None] * exponents.exp()
    return torch.cat([angles.sin(), angles.cos()], dim=1)
