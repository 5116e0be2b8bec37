"""Clips with known answers, the same numbers always, and networks with random weights."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from tokenflow.miniature.tokenizer import MAX_LENGTH, save_tokenizer


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Independent uniform numbers in 0..1."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def still(frames: int, height: int = 16, width: int = 20) -> Tensor:
    """One picture of noise, again and again."""
    return noise(3, height, width).expand(frames, -1, -1, -1).clone()


def translation(frames: int, height: int = 16, width: int = 20, step: int = 2) -> Tensor:
    """A picture of noise that moves `step` pixels to the left from frame to frame."""
    wide = noise(3, height, width + step * frames)
    return torch.stack([wide[..., step * i : step * i + width] for i in range(frames)])


def write_tiny_clip(folder: Path) -> Path:
    """A CLIP of the right shape, with few channels and random weights."""
    words = len(save_tokenizer(folder))
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
             "num_attention_heads": 2}  # fmt: skip
    text = {**small, "vocab_size": words, "max_position_embeddings": MAX_LENGTH,
            "bos_token_id": words - 2, "eos_token_id": words - 1}  # fmt: skip
    vision = {**small, "image_size": 16, "patch_size": 8}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
        CLIPModel(config).save_pretrained(folder)
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    CLIPImageProcessorPil(**size).save_pretrained(folder)
    return folder


def write_random_alexnet(folder: Path) -> Path:
    """A file of AlexNet's features with random weights; needs torchvision."""
    from torchvision.models import alexnet

    with torch.random.fork_rng():
        torch.manual_seed(0)
        features = alexnet(weights=None).features.state_dict()
    file = folder / "alexnet.safetensors"
    save_file({f"features.{name}": value for name, value in features.items()}, file)
    return file
