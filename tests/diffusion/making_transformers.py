"""Tiny models of the flow-matching families, and plain sampling, for tests."""

import json
import shutil
import string
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
)
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from tokenflow.diffusion import Backbone, Flux, StableDiffusion3, Trajectory
from tokenflow.editors import Editor, Prompts
from tokenflow.engine import Settings, edit_latents
from tokenflow.miniature.tokenizer import MAX_LENGTH, save_tokenizer
from tokenflow.propagation import NNField

DIFFUSERS, TRANSFORMERS = "diffusers", "transformers"


def write_tiny_sd3(folder: Path, t5: bool = True, **transformer: Any) -> Path:
    """A Stable Diffusion 3.5 in diffusers' layout, with or without its third text encoder."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        config = {
            "sample_size": 8, "num_layers": 3, "attention_head_dim": 8, "num_attention_heads": 2,
            "joint_attention_dim": 20, "caption_projection_dim": 16, "pooled_projection_dim": 14,
            "in_channels": 4, "out_channels": 4, "pos_embed_max_size": 16, "qk_norm": "rms_norm",
            "dual_attention_layers": (0,), **transformer,
        }  # fmt: skip
        randomised(SD3Transformer2DModel(**config)).save_pretrained(folder / "transformer")
        write_vae(folder)
        for name, width, projected in (("text_encoder", 12, 6), ("text_encoder_2", 8, 8)):
            write_clip(folder, name, CLIPTextModelWithProjection, width, projected)
        if t5:
            write_t5(folder, "3", 20)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.save_pretrained(folder / "scheduler")
    present = [TRANSFORMERS if t5 else None]
    return write_index(folder, "StableDiffusion3Pipeline", {
        "transformer": [DIFFUSERS, "SD3Transformer2DModel"],
        "text_encoder": [TRANSFORMERS, "CLIPTextModelWithProjection"],
        "text_encoder_2": [TRANSFORMERS, "CLIPTextModelWithProjection"],
        "text_encoder_3": [*present, "T5EncoderModel" if t5 else None],
        "tokenizer": [TRANSFORMERS, "CLIPTokenizer"],
        "tokenizer_2": [TRANSFORMERS, "CLIPTokenizer"],
        "tokenizer_3": [*present, "T5TokenizerFast" if t5 else None],
    })  # fmt: skip


def write_tiny_flux(folder: Path, dev: bool = True) -> Path:
    """A Flux in diffusers' layout: dev, or schnell with a fixed shift and without guidance."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        transformer = FluxTransformer2DModel(
            in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=8,
            num_attention_heads=2, joint_attention_dim=20, pooled_projection_dim=12,
            guidance_embeds=dev, axes_dims_rope=(2, 2, 4),
        )  # fmt: skip
        randomised(transformer).save_pretrained(folder / "transformer")
        write_vae(folder)
        write_clip(folder, "text_encoder", CLIPTextModel, 12, 12)
        write_t5(folder, "2", 20)
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0 if dev else 1.0, use_dynamic_shifting=dev, base_image_seq_len=8,
        max_image_seq_len=64,
    )  # fmt: skip
    scheduler.save_pretrained(folder / "scheduler")
    return write_index(folder, "FluxPipeline", {
        "transformer": [DIFFUSERS, "FluxTransformer2DModel"],
        "text_encoder": [TRANSFORMERS, "CLIPTextModel"],
        "text_encoder_2": [TRANSFORMERS, "T5EncoderModel"],
        "tokenizer": [TRANSFORMERS, "CLIPTokenizer"],
        "tokenizer_2": [TRANSFORMERS, "T5TokenizerFast"],
    })  # fmt: skip


def randomised(network: torch.nn.Module) -> Any:
    """With weights that are large enough for every part to have an effect."""
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
        else:  # norms of queries and keys
            torch.nn.init.uniform_(parameter, 0.5, 2.0)
    return network


def write_vae(folder: Path) -> None:
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        sample_size=16,
        mid_block_add_attention=False,
        scaling_factor=1.5,
        shift_factor=0.06,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).save_pretrained(folder / "vae")


def write_clip(folder: Path, name: str, kind: Any, width: int, projected: int) -> None:
    words = len(save_tokenizer(folder / name.replace("text_encoder", "tokenizer")))
    config = CLIPTextConfig(
        vocab_size=words,
        hidden_size=width,
        intermediate_size=16,
        projection_dim=projected,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=words - 2,
        eos_token_id=words - 1,
    )
    kind(config).save_pretrained(folder / name)


def write_t5(folder: Path, number: str, width: int) -> None:
    pieces = ["<pad>", "</s>", "<unk>", "▁", *string.ascii_lowercase]
    tokenizer = T5Tokenizer(vocab=[(piece, -1.0) for piece in pieces], extra_ids=0)
    tokenizer.save_pretrained(folder / f"tokenizer_{number}")
    config = T5Config(
        vocab_size=len(pieces), d_model=width, d_kv=4, d_ff=16, num_layers=1, num_heads=2
    )
    T5EncoderModel(config).save_pretrained(folder / f"text_encoder_{number}")


def write_index(folder: Path, pipeline: str, parts: dict[str, list[str | None]]) -> Path:
    index = {
        "_class_name": pipeline,
        **parts,
        "vae": [DIFFUSERS, "AutoencoderKL"],
        "scheduler": [DIFFUSERS, "FlowMatchEulerDiscreteScheduler"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def parts(model: StableDiffusion3 | Flux) -> dict[str, Any]:
    """As diffusers' pipeline takes them."""
    if isinstance(model, Flux):
        return {
            "transformer": model.transformer, "vae": model.vae, "scheduler": model.scheduler,
            "text_encoder": model.clip.encoder, "tokenizer": model.clip.tokenizer,
            "text_encoder_2": model.t5.encoder, "tokenizer_2": model.t5.tokenizer,
        }  # fmt: skip
    first, second = model.clips
    return {
        "transformer": model.transformer, "vae": model.vae, "scheduler": model.scheduler,
        "text_encoder": first.encoder, "tokenizer": first.tokenizer,
        "text_encoder_2": second.encoder, "tokenizer_2": second.tokenizer,
        "text_encoder_3": None if model.t5 is None else model.t5.encoder,
        "tokenizer_3": None if model.t5 is None else model.t5.tokenizer,
    }  # fmt: skip


def changed(file: Path, **values: Any) -> None:
    """Writes other values into a file of JSON; what is None in it goes."""
    known = json.loads(file.read_text()) | values
    file.write_text(json.dumps({name: value for name, value in known.items() if value is not None}))


def copied(folder: Path, to: Path) -> Path:
    """A copy, to be spoilt."""
    return Path(shutil.copytree(folder, to))


def sampled(
    model: Backbone,
    noise: Tensor,
    steps: int,
    prompt: str,
    negative_prompt: str = "",
    guidance: float = 1.0,
) -> Tensor:
    """Every frame by itself, from noise to latents, by the engine with an editor of no effect."""
    schedule = model.schedule(steps, (noise.shape[2], noise.shape[3]))
    source = Trajectory(schedule.timesteps, noise.expand(steps, *noise.shape), noise, noise)
    return edit_latents(
        model, source, schedule, Prompts(prompt, negative_prompt), Editor(), NNField(),
        Settings(steps=steps, guidance=guidance, consistency="none"), x=noise,
    )  # fmt: skip
