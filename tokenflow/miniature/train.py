"""Trains the miniature: `python -m tokenflow.miniature.train --folder DIR`.

Three ordinary Lightning modules (autoencoder, denoiser, judge) on scenes rendered from seeds.
Every stage keeps checkpoints in `DIR` and goes on from the last one when it is started again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from jaxtyping import Float, Int, UInt8
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import save_model
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import CLIPTextConfig, CLIPTextModel

from tokenflow.miniature import scenes
from tokenflow.miniature.judge import Judge, labels
from tokenflow.miniature.scenes import SIZE, VOCABULARY, random_scene
from tokenflow.miniature.tokenizer import MAX_LENGTH, save_tokenizer

WEIGHTS = Path(__file__).parent / "weights"
CROPPED = 0.6  # of the denoiser's steps see crops of 3/4 of the side, at less than half the cost
SCENES = 12_288  # seeds 0 .. SCENES - 1 are for training; evaluation uses seeds from a million up


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


class Stage(LightningModule):
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


class Autoencoder(Stage):
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


class Denoiser(Stage):
    """Stage `unet`: UNet and text encoder predict the noise in the autoencoder's latents."""

    def __init__(self, vocabulary: int, nothing: Int[Tensor, " length"]) -> None:
        super().__init__(rate=1e-3)
        self.unet = new_unet().to(memory_format=torch.channels_last)
        self.text_encoder = new_text_encoder(vocabulary)
        self.alphas: Tensor
        self.nothing: Tensor
        self.register_buffer("nothing", nothing, persistent=False)
        self.register_buffer("alphas", new_scheduler().alphas_cumprod.clone(), persistent=False)

    def loss(
        self, latents: Float[Tensor, "batch 4 height width"], tokens: Int[Tensor, "batch length"]
    ) -> Tensor:
        if self.global_step < CROPPED * self.trainer.max_steps:
            top, left = torch.randint(0, latents.shape[-1] // 4 + 1, (2,)).tolist()
            side = latents.shape[-1] * 3 // 4
            latents = latents[..., top : top + side, left : left + side]
        dropped = torch.rand(len(tokens), 1, device=tokens.device) < 0.1
        tokens = torch.where(dropped, self.nothing, tokens)
        t = torch.randint(len(self.alphas), (len(latents),), device=latents.device)
        a = self.alphas[t][:, None, None, None]
        # noise with a random mean hides the hue for longer, so that it is learnt from the prompt
        noise = torch.randn_like(latents)
        noise = noise + 0.1 * torch.randn(*noise.shape[:2], 1, 1, device=noise.device)
        x = (a.sqrt() * latents + (1 - a).sqrt() * noise).contiguous(
            memory_format=torch.channels_last
        )
        predicted = self.unet(
            x, t, encoder_hidden_states=self.text_encoder(tokens)[0]
        ).sample.float()
        # min-SNR (Hang et al. 2023) for the clean end; the noisy end, where the global hue is
        # decided while the noise is easily guessed, counts more
        snr = a / (1 - a)
        weight = snr.clamp(max=5) / snr / (a + 0.01)
        return (weight * (predicted - noise).square()).mean()


class JudgeTraining(Stage):
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
        x = x + 0.05 * torch.rand(len(x), 1, 1, 1) * torch.randn_like(x)
        answers = self.judge(x)
        losses = [
            torch.nn.functional.cross_entropy(answers[name], labels[:, i])
            for i, name in enumerate(VOCABULARY)
        ]
        return torch.stack(losses).sum()


class Endless(IterableDataset[tuple[Tensor, ...]]):
    """Batches drawn for ever from tensors of equal length."""

    def __init__(self, *tensors: Tensor, batch: int) -> None:
        self.tensors, self.batch = tensors, batch

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        while True:
            chosen = torch.randint(len(self.tensors[0]), (self.batch,))
            yield tuple(tensor[chosen] for tensor in self.tensors)


def to_signed(images: UInt8[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Bytes to the -1..1 that autoencoders take."""
    return images.float() / 127.5 - 1


def rendered(folder: Path) -> UInt8[Tensor, "scenes 3 height width"]:
    """One still of each training seed, rendered once."""
    drawn = sha256(Path(scenes.__file__).read_bytes()).hexdigest()[:8]
    file = folder / f"images-{drawn}.pt"
    if not file.exists():
        images = [(random_scene(seed).frame(0) * 255).round().byte() for seed in range(SCENES)]
        torch.save(torch.stack(images), file)
    return torch.load(file)


def fit(
    stage: Stage, data: Endless, steps: int, folder: Path, precision: str, average: bool = False
) -> Stage:
    """Trains up to `steps`, from the last checkpoint in `folder` if there is one."""
    keep = ModelCheckpoint(
        folder, filename="{step}", every_n_train_steps=100, save_last=True, save_top_k=1
    )
    last = folder / "last.ckpt"
    seed_everything(torch.load(last)["global_step"] if last.exists() else 0)
    trainer = Trainer(
        accelerator="auto",
        devices=1,
        max_steps=steps,
        precision=precision,  # type: ignore[arg-type]
        gradient_clip_val=1.0,
        callbacks=[keep, EMAWeightAveraging(decay=0.998)] if average else [keep],
        logger=CSVLogger(folder, name="log"),
        log_every_n_steps=50,
    )
    trainer.fit(stage, DataLoader(data, batch_size=None), ckpt_path=last if last.exists() else None)
    return stage.cpu().eval()


def encoded(folder: Path, vae: AutoencoderKL) -> Float[Tensor, "scenes 4 height width"]:
    """The training stills' scaled latents, encoded once."""
    file = folder / "latents.pt"
    if not file.exists():
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            parts = [
                vae.encode(to_signed(part)).latent_dist.mean.float()
                for part in rendered(folder).split(32)
            ]
        torch.save(torch.cat(parts) * vae.config.scaling_factor, file)
    return torch.load(file)


def train_vae(folder: Path, steps: int, precision: str) -> None:
    """Trains the autoencoder and writes `vae/`, with the scaling factor of its latents."""
    stage = Autoencoder()
    fit(stage, Endless(rendered(folder), batch=16), steps, folder / "vae", precision)
    with torch.inference_mode():
        sample = to_signed(rendered(folder)[:512])
        latents = torch.cat([stage.vae.encode(x).latent_dist.mean for x in sample.split(32)])
    stage.vae.register_to_config(scaling_factor=1 / latents.std().item())
    stage.vae.half().save_pretrained(WEIGHTS / "vae")
    (folder / "latents.pt").unlink(missing_ok=True)


def train_unet(folder: Path, steps: int, precision: str) -> None:
    """Trains UNet and text encoder and writes the rest of the diffusers folder."""
    tokenizer = save_tokenizer(WEIGHTS / "tokenizer")
    captions = [str(random_scene(seed).attributes) for seed in range(SCENES)]
    vae = AutoencoderKL.from_pretrained(WEIGHTS / "vae", torch_dtype=torch.float32)
    tokens = tokenizer(captions, padding="max_length", return_tensors="pt")["input_ids"]
    nothing = tokenizer("", padding="max_length", return_tensors="pt")["input_ids"][0]
    stage = Denoiser(len(tokenizer), nothing)
    data = Endless(encoded(folder, vae), tokens, batch=16)
    fit(stage, data, steps, folder / "unet", precision, average=True)
    save_denoiser(stage)


def save_denoiser(stage: Denoiser) -> None:
    """Writes UNet, text encoder, scheduler and index of the diffusers folder."""
    stage.unet.half().save_pretrained(WEIGHTS / "unet")
    stage.text_encoder.half().save_pretrained(WEIGHTS / "text_encoder")
    new_scheduler().save_pretrained(WEIGHTS / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (WEIGHTS / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def train_judge(folder: Path, steps: int, precision: str) -> None:
    """Trains the judge and writes `judge.safetensors`."""
    shown = [random_scene(seed).attributes for seed in range(SCENES)]
    stage = JudgeTraining()
    data = Endless(rendered(folder), torch.stack([labels(a) for a in shown]), batch=32)
    fit(stage, data, steps, folder / "judge", precision)
    save_model(stage.judge.half(), str(WEIGHTS / "judge.safetensors"))


def main(
    folder: Path,
    stage: Literal["vae", "judge", "unet", "all"] = "all",
    vae_steps: int = 2100,
    judge_steps: int = 1600,
    unet_steps: int = 7000,
    precision: str = "32-true",
) -> None:
    """Trains the miniature, or one stage of it, and writes its weights into this package.

    Args:
        folder: Where rendered images, latents and checkpoints are kept between sittings.
        stage: What to train; the UNet needs the autoencoder.
        vae_steps: Steps of the autoencoder, 16 crops each.
        judge_steps: Steps of the judge, 32 scenes each.
        unet_steps: Steps of UNet and text encoder, 16 latents each.
        precision: Lightning's precision.
    """
    folder.mkdir(parents=True, exist_ok=True)
    WEIGHTS.mkdir(exist_ok=True)
    if stage in ("vae", "all"):
        train_vae(folder, vae_steps, precision)
    if stage in ("judge", "all"):
        train_judge(folder, judge_steps, precision)
    if stage in ("unet", "all"):
        train_unet(folder, unet_steps, precision)


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main, as_positional=False)
