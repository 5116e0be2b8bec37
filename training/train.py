"""Trains the miniature: `python -m training.train --folder DIR`.

Ordinary Lightning modules on scenes rendered from seeds. Every stage keeps checkpoints in `DIR`
and goes on from the last one when it is started again.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Literal

import torch
from diffusers import (
    AutoencoderKL,
    LatentConsistencyModelPipeline,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from jaxtyping import Int
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import save_model
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from tokenflow.diffusion import StableDiffusion
from tokenflow.diffusion.backbone import Defaults
from tokenflow.diffusion.latent_diffusion import DEFAULTS
from tokenflow.miniature import LCM, TRANSFORMER, WEIGHTS
from tokenflow.miniature.judge import labels
from tokenflow.miniature.scenes import random_scene
from tokenflow.miniature.tokenizer import save_tokenizer
from training.consistency import ConsistencyDistillation
from training.modules import (
    AutoencoderTraining,
    ControlTraining,
    DenoiserTraining,
    JudgeTraining,
    TrainingModule,
)
from training.networks import (
    new_consistency_scheduler,
    new_flow_scheduler,
    new_projected_text_encoder,
    new_scheduler,
    new_transformer,
)
from training.stills import (
    SCENES,
    Endless,
    canny_edges,
    encoded,
    near_objects,
    rendered,
    to_signed,
    without_shape,
)
from training.transformer import FlowTraining


def fit(
    stage: TrainingModule,
    data: Endless,
    steps: int,
    folder: Path,
    precision: str,
    average: bool = False,
) -> TrainingModule:
    """Trains up to `steps`, from the last checkpoint in `folder` if there is one.

    With `average`, the stage ends with the moving average of its weights.
    """
    keep = ModelCheckpoint(
        folder, filename="{step}", every_n_train_steps=100, save_last=True, save_top_k=1
    )
    last = folder / "last.ckpt"
    kept = torch.load(last, map_location="cpu") if last.exists() else None
    if kept is not None and kept["global_step"] >= steps:
        # by itself: a trainer without a step to do would leave what was trained, not its average
        stage.load_state_dict(kept["state_dict"])
        return stage.eval()
    seed_everything(0 if kept is None else kept["global_step"])
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
    trainer.fit(stage, DataLoader(data, batch_size=None), ckpt_path=last if kept else None)
    return stage.cpu().eval()


def train_vae(folder: Path, steps: int, precision: str) -> None:
    """Trains the autoencoder and writes `vae/`, with the scaling factor of its latents."""
    stage = AutoencoderTraining()
    fit(stage, Endless(rendered(folder), batch=16), steps, folder / "vae", precision)
    with torch.inference_mode():
        sample = to_signed(rendered(folder)[:512])
        latents = torch.cat([stage.vae.encode(x).latent_dist.mean for x in sample.split(32)])
    stage.vae.register_to_config(scaling_factor=1 / latents.std().item())
    stage.vae.half().save_pretrained(WEIGHTS / "vae")
    for file in folder.glob("latents-*.pt"):
        file.unlink()


def train_unet(folder: Path, steps: int, precision: str) -> None:
    """Trains UNet and text encoder and writes the rest of the diffusers folder."""
    tokenizer = save_tokenizer(WEIGHTS / "tokenizer")
    captions = [str(random_scene(seed).attributes) for seed in range(SCENES)]
    vae = AutoencoderKL.from_pretrained(WEIGHTS / "vae", torch_dtype=torch.float32)
    tokens = tokenizer(captions, padding="max_length", return_tensors="pt")["input_ids"]
    nothing = tokenizer("", padding="max_length", return_tensors="pt")["input_ids"][0]
    stage = DenoiserTraining(len(tokenizer), nothing)
    data = Endless(encoded(folder, vae), tokens, batch=16)
    fit(stage, data, steps, folder / "unet", precision, average=True)
    save_denoiser(stage)


def save_denoiser(stage: DenoiserTraining) -> None:
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


def train_controlnet(folder: Path, steps: int, precision: str) -> None:
    """Trains a ControlNet for the UNet in this package and writes `controlnet/`.

    Its checkpoints go with the UNet's weights: another UNet begins another training.
    """
    backbone = StableDiffusion.from_model(str(WEIGHTS), "cpu", torch.float32)
    shown = [random_scene(seed).attributes for seed in range(SCENES)]
    tokens, shapeless, nothing = (
        backbone.tokenizer(captions, padding="max_length", return_tensors="pt")["input_ids"]
        for captions in ([str(a) for a in shown], [without_shape(a) for a in shown], [""])
    )
    stage = ControlTraining(backbone.unet, backbone.text_encoder, nothing[0])
    latents, edges = encoded(folder, backbone.vae), canny_edges(rendered(folder))
    data = Endless(latents, edges, tokens, shapeless, batch=16)
    fit(stage, data, steps, folder / f"controlnet-{unet_version()}", precision, average=True)
    stage.controlnet.half().save_pretrained(WEIGHTS / "controlnet")


def train_transformer(folder: Path, steps: int, precision: str) -> None:
    """Trains a flow-matching transformer and writes its diffusers folder."""
    tokenizer = CLIPTokenizer.from_pretrained(WEIGHTS / "tokenizer")
    captions = [str(random_scene(seed).attributes) for seed in range(SCENES)]
    tokens, nothing = (
        tokenizer(texts, padding="max_length", return_tensors="pt")["input_ids"]
        for texts in (captions, [""])
    )
    stage = new_flow_training(new_transformer(), nothing[0])
    vae = AutoencoderKL.from_pretrained(WEIGHTS / "vae", torch_dtype=torch.float32)
    latents = encoded(folder, vae)
    data = Endless(latents, tokens, near_objects(latents.shape[-1]), batch=16)
    fit(stage, data, steps, folder / "transformer", precision, average=True)
    save_transformer(stage, TRANSFORMER)


def new_flow_training(
    transformer: SD3Transformer2DModel, nothing: Int[Tensor, " length"]
) -> FlowTraining:
    """Of a new transformer, with the UNet's text encoder and a new one half as wide."""
    first = CLIPTextModelWithProjection.from_pretrained(
        WEIGHTS / "text_encoder", torch_dtype=torch.float32, projection_dim=128
    )
    second = new_projected_text_encoder(first.config.vocab_size, 64)
    return FlowTraining(transformer, (first, second), nothing)


def save_transformer(stage: FlowTraining, folder: Path) -> None:
    """Writes the folder that `StableDiffusion3Pipeline` loads."""
    vae = AutoencoderKL.from_pretrained(WEIGHTS / "vae", torch_dtype=torch.float16)
    vae.register_to_config(shift_factor=0.0)
    tokenizer = CLIPTokenizer.from_pretrained(WEIGHTS / "tokenizer")
    StableDiffusion3Pipeline(
        transformer=stage.transformer.half(),
        scheduler=new_flow_scheduler(),
        vae=vae,
        text_encoder=stage.text_encoder.half(),
        tokenizer=tokenizer,
        text_encoder_2=stage.text_encoder_2.half(),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    ).save_pretrained(folder)
    forget_origins(folder)
    save_defaults(Defaults(guidance=3.0, features=0.0), folder)


def train_lcm(folder: Path, steps: int, precision: str) -> None:
    """Distils the UNet in this package to a few steps and writes its diffusers folder.

    Its checkpoints go with the UNet's weights: another UNet begins another training.
    """
    teacher = StableDiffusion.from_model(str(WEIGHTS), "cpu", torch.float32)
    captions = [str(random_scene(seed).attributes) for seed in range(SCENES)]
    tokens, nothing = (
        teacher.tokenizer(texts, padding="max_length", return_tensors="pt")["input_ids"]
        for texts in (captions, [""])
    )
    stage = ConsistencyDistillation(
        teacher.unet, teacher.text_encoder, nothing[0], new_consistency_scheduler()
    )
    data = Endless(encoded(folder, teacher.vae), tokens, batch=16)
    fit(stage, data, steps, folder / f"lcm-{unet_version()}", precision, average=True)
    save_lcm(stage, LCM)


def save_lcm(stage: ConsistencyDistillation, folder: Path) -> None:
    """Writes the folder that `LatentConsistencyModelPipeline` loads."""
    LatentConsistencyModelPipeline(
        unet=stage.unet.half(),
        scheduler=stage.scheduler,
        vae=AutoencoderKL.from_pretrained(WEIGHTS / "vae", torch_dtype=torch.float16),
        text_encoder=stage.text_encoder.half(),
        tokenizer=CLIPTokenizer.from_pretrained(WEIGHTS / "tokenizer"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    forget_origins(folder)
    save_defaults(Defaults.read(WEIGHTS / DEFAULTS), folder)


def forget_origins(folder: Path) -> None:
    """Removes from configurations the folder that weights were read from, which diffusers notes."""
    for file in folder.glob("*/config.json"):
        config = json.loads(file.read_text())
        config.pop("_name_or_path", None)
        file.write_text(json.dumps(config, indent=2) + "\n")


def save_defaults(defaults: Defaults, folder: Path) -> None:
    """Writes the options of an edit that `Backbone.load` reads with the model."""
    (folder / DEFAULTS).write_text(json.dumps(asdict(defaults), indent=2) + "\n")


def unet_version() -> str:
    """A short name of the UNet's weights in this package."""
    unet = WEIGHTS / "unet" / "diffusion_pytorch_model.safetensors"
    return sha256(unet.read_bytes()).hexdigest()[:8]


def main(
    folder: Path,
    stage: Literal["vae", "judge", "unet", "controlnet", "lcm", "transformer", "all"] = "all",
    vae_steps: int = 2100,
    judge_steps: int = 1600,
    unet_steps: int = 7000,
    controlnet_steps: int = 3000,
    lcm_steps: int = 1000,
    transformer_steps: int = 27_000,
    precision: str = "32-true",
) -> None:
    """Trains the miniature, or one stage of it, and writes its weights into the package.

    Args:
        folder: Where rendered images, latents and checkpoints are kept between sittings.
        stage: What to train; the UNet needs the autoencoder, the others
            but the judge need both.
        vae_steps: Steps of the autoencoder, 16 crops each.
        judge_steps: Steps of the judge, 32 scenes each.
        unet_steps: Steps of UNet and text encoder, 16 latents each.
        controlnet_steps: Steps of the ControlNet, 16 latents each.
        lcm_steps: Steps of the UNet's distillation, 16 latents each.
        transformer_steps: Steps of the transformer, 16 latents each.
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
    if stage in ("controlnet", "all"):
        train_controlnet(folder, controlnet_steps, precision)
    if stage in ("lcm", "all"):
        train_lcm(folder, lcm_steps, precision)
    if stage in ("transformer", "all"):
        train_transformer(folder, transformer_steps, precision)


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main, as_positional=False)
