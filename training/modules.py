"""What is trained and on which loss: one Lightning module for each stage."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from jaxtyping import Float, Int, UInt8
from lightning.pytorch import LightningModule
from torch import Tensor
from transformers import CLIPTextModel

from tokenflow.miniature.judge import Judge
from tokenflow.miniature.scenes import SIZE, VOCABULARY
from training.networks import new_controlnet, new_scheduler, new_text_encoder, new_unet, new_vae
from training.stills import to_signed

CROPPED = 0.6  # of a denoiser's steps see crops of 3/4 of the side, at less than half the cost


class TrainingModule(LightningModule):
    """AdamW with warm-up and cosine decay over `max_steps`, and a loss that is logged."""

    loss: Callable[..., Tensor]

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def training_step(self, batch: list[Tensor], batch_index: int) -> Tensor:
        loss = self.loss(*batch)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), self.rate, (0.9, 0.99), weight_decay=0.01)
        steps = self.trainer.max_steps

        def factor(step: int) -> float:
            decay = 0.5 + 0.5 * math.cos(math.pi * min(step / steps, 1))
            return min((step + 1) / 200, 1) * (0.01 + 0.99 * decay)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class AutoencoderTraining(TrainingModule):
    """Stage `vae`, on random crops of a quarter of the area."""

    def __init__(self) -> None:
        super().__init__(rate=2e-3)
        self.vae = new_vae().to(memory_format=torch.channels_last)

    def loss(self, images: UInt8[Tensor, "batch 3 height width"]) -> Tensor:
        top, left = torch.randint(0, SIZE // 2 + 1, (2,)).tolist()
        crop = images[..., top : top + SIZE // 2, left : left + SIZE // 2]
        x = to_signed(crop).contiguous(memory_format=torch.channels_last)
        posterior = self.vae.encode(x).latent_dist
        y = self.vae.decode(posterior.sample()).sample.float()
        error = y - x
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        fidelity = error.abs().mean() + 4 * error.square().mean()
        self.log("psnr", -10 * (error / 2).square().mean().log10(), prog_bar=True)
        return fidelity + 0.25 * edges + 1e-6 * posterior.kl().mean()


class NoisePrediction(TrainingModule):
    """What the stages that denoise latents have in common: crops, noise, and the loss's weights."""

    def __init__(self, rate: float) -> None:
        super().__init__(rate)
        self.alphas: Tensor
        self.register_buffer("alphas", new_scheduler().alphas_cumprod.clone(), persistent=False)

    def crop(self, latents: Tensor, *images: Tensor) -> tuple[Tensor, ...]:
        """The same random 3/4 of the side of latents and their images; late in training, all."""
        if self.global_step >= CROPPED * self.trainer.max_steps:
            return latents, *images
        grid = latents.shape[-1]
        top, left = torch.randint(0, grid // 4 + 1, (2,)).tolist()
        side, parts = grid * 3 // 4, []
        for whole in (latents, *images):
            n = whole.shape[-1] // grid
            parts.append(whole[..., n * top : n * (top + side), n * left : n * (left + side)])
        return tuple(parts)

    def noised(
        self, latents: Float[Tensor, "batch 4 height width"]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Noisy latents, their timesteps (batch,), the noise, and its error's weights.

        The weights are min-SNR's (Hang et al. 2023) for the clean end; the noisy end, where the
        global hue is decided while the noise is easily guessed, counts more.
        """
        t = torch.randint(len(self.alphas), (len(latents),), device=latents.device)
        a = self.alphas[t][:, None, None, None]
        # noise with a random mean hides the hue for longer, so that it is learnt from the prompt
        noise = torch.randn_like(latents)
        noise = noise + 0.1 * torch.randn(*noise.shape[:2], 1, 1, device=noise.device)
        x = (a.sqrt() * latents + (1 - a).sqrt() * noise).contiguous(
            memory_format=torch.channels_last
        )
        snr = a / (1 - a)
        return x, t, noise, snr.clamp(max=5) / snr / (a + 0.1)


class DenoiserTraining(NoisePrediction):
    """Stage `unet`: UNet and text encoder predict the noise in the autoencoder's latents."""

    def __init__(self, vocabulary: int, nothing: Int[Tensor, " length"]) -> None:
        super().__init__(rate=1e-3)
        self.unet = new_unet().to(memory_format=torch.channels_last)
        self.text_encoder = new_text_encoder(vocabulary)
        self.nothing: Tensor
        self.register_buffer("nothing", nothing, persistent=False)

    def loss(
        self, latents: Float[Tensor, "batch 4 height width"], tokens: Int[Tensor, "batch length"]
    ) -> Tensor:
        (latents,) = self.crop(latents)
        dropped = torch.rand(len(tokens), 1, device=tokens.device) < 0.1
        tokens = torch.where(dropped, self.nothing, tokens)
        x, t, noise, weight = self.noised(latents)
        text = self.text_encoder(tokens)[0]
        predicted = self.unet(x, t, encoder_hidden_states=text).sample.float()
        return (weight * (predicted - noise).square()).mean()


class ControlTraining(NoisePrediction):
    """Stage `controlnet`: a ControlNet for Canny edges, with the UNet frozen.

    Half of the prompts keep something from it, so that it learns to see for itself: a quarter
    lack the shape, a quarter say nothing.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        text_encoder: CLIPTextModel,
        nothing: Int[Tensor, " length"],
    ) -> None:
        super().__init__(rate=1e-3)
        self.controlnet = new_controlnet(unet).to(memory_format=torch.channels_last)
        self.unet = unet.requires_grad_(False).to(memory_format=torch.channels_last)
        self.text_encoder = text_encoder.requires_grad_(False)
        self.nothing: Tensor
        self.register_buffer("nothing", nothing, persistent=False)

    def loss(
        self,
        latents: Float[Tensor, "batch 4 height width"],
        edges: UInt8[Tensor, "batch 1 edges_height edges_width"],
        tokens: Int[Tensor, "batch length"],
        shapeless: Int[Tensor, "batch length"],
    ) -> Tensor:
        latents, edges = self.crop(latents, edges)
        draw = torch.rand(len(tokens), 1, device=tokens.device)
        tokens = torch.where(draw < 0.25, self.nothing, torch.where(draw < 0.5, shapeless, tokens))
        x, t, noise, weight = self.noised(latents)
        text = self.text_encoder(tokens)[0]
        shown = (edges.float() / 255).expand(-1, 3, -1, -1)
        down, middle = self.controlnet(x, t, text, shown, return_dict=False)
        predicted = self.unet(
            x,
            t,
            encoder_hidden_states=text,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
        ).sample.float()
        return (weight * (predicted - noise).square()).mean()


class JudgeTraining(TrainingModule):
    """Stage `judge`: four classifications of mirrored and slightly noisy scenes."""

    def __init__(self) -> None:
        super().__init__(rate=2e-3)
        self.judge = Judge()

    def loss(
        self, images: UInt8[Tensor, "batch 3 height width"], labels: Int[Tensor, "batch 4"]
    ) -> Tensor:
        turned = images.flip(-1) if torch.rand(()) < 0.5 else images
        turned = turned.flip(-2) if torch.rand(()) < 0.5 else turned
        x = to_signed(turned) / 2 + 0.5
        x = x + 0.05 * torch.rand(len(x), 1, 1, 1, device=x.device) * torch.randn_like(x)
        answers = self.judge(x)
        losses = [
            torch.nn.functional.cross_entropy(answers[name], labels[:, i])
            for i, name in enumerate(VOCABULARY)
        ]
        return torch.stack(losses).sum()
