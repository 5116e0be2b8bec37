"""A model's weights under the names of the original code: `state_dict` of its single file."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor

RESNET = [
    ("norm1", "in_layers.0"), ("conv1", "in_layers.2"), ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"), ("time_emb_proj", "emb_layers.1"),
    ("conv_shortcut", "skip_connection"),
]  # fmt: skip
UNET = [
    ("time_embedding.linear_1", "time_embed.0"), ("time_embedding.linear_2", "time_embed.2"),
    ("add_embedding.linear_1", "label_emb.0.0"), ("add_embedding.linear_2", "label_emb.0.2"),
    ("conv_in", "input_blocks.0.0"), ("conv_norm_out", "out.0"), ("conv_out", "out.2"),
    ("mid_block.resnets.0", "middle_block.0"), ("mid_block.attentions.0", "middle_block.1"),
    ("mid_block.resnets.1", "middle_block.2"),
]  # fmt: skip
VAE = [
    (".mid_block.resnets.0", ".mid.block_1"), (".mid_block.resnets.1", ".mid.block_2"),
    (".mid_block.attentions.0", ".mid.attn_1"), ("group_norm", "norm"), ("to_out.0", "proj_out"),
    ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), (".conv_norm_out", ".norm_out"),
    (".resnets.", ".block."), ("downsamplers.0", "downsample"), ("upsamplers.0", "upsample"),
    ("conv_shortcut", "nin_shortcut"), ("down_blocks", "down"), ("up_blocks", "up"),
]  # fmt: skip
OPEN_CLIP = [
    ("embeddings.position_embedding.weight", "positional_embedding"),
    ("embeddings.token_embedding", "token_embedding"), ("final_layer_norm", "ln_final"),
    ("encoder.layers", "transformer.resblocks"), ("layer_norm", "ln_"), ("fc1", "c_fc"),
    ("fc2", "c_proj"), ("self_attn", "attn"),
]  # fmt: skip


def renamed(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    for old, new in pairs:
        name = name.replace(old, new)
    return name


def original_unet(weights: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    def original(name: str) -> str:
        found = re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name)
        if found is None:
            return renamed(renamed(name, UNET), RESNET if ".resnets." in name else [])
        side, block, kind, number, rest = found.groups()
        at = int(block) * (layers + 1) + int(number) + (side == "down")
        if kind == "downsamplers":
            return f"input_blocks.{at + layers}.0.{rest.replace('conv', 'op')}"
        if kind == "upsamplers":
            attends = any(f"up_blocks.{block}.attentions." in other for other in weights)
            return f"output_blocks.{at + layers}.{1 + attends}.{rest}"
        part = f"0.{renamed(rest, RESNET)}" if kind == "resnets" else f"1.{rest}"
        return f"{'input' if side == 'down' else 'output'}_blocks.{at}.{part}"

    made = {original(name): weight for name, weight in weights.items()}
    return {
        name if not re.match(r"middle_block\.[02]", name) else renamed(name, RESNET): weight
        for name, weight in made.items()
    }


def original_vae(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    levels = 1 + max(int(n.split(".")[2]) for n in weights if n.startswith("decoder.up_blocks"))
    made = {}
    for name, weight in weights.items():
        turned = re.sub(
            r"decoder\.up_blocks\.(\d+)",
            lambda found: f"decoder.up_blocks.{levels - 1 - int(found[1])}",
            name,
        )
        square = "attentions" in name and weight.ndim == 2
        made[renamed(turned, VAE)] = weight[..., None, None] if square else weight
    return made


def original_clip(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"text_model.{name.removeprefix('text_model.')}": w for name, w in weights.items()}


def original_open_clip(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    made: dict[str, Tensor] = {}
    for long, weight in weights.items():
        name = renamed(long.removeprefix("text_model."), OPEN_CLIP)
        if name == "text_projection.weight":
            made["text_projection"] = weight.T
        elif found := re.match(r"(.*attn)\.q_proj\.(\w+)", name):
            three = [weights[long.replace("q_proj", f"{one}_proj")] for one in "qkv"]
            made[f"{found[1]}.in_proj_{found[2]}"] = torch.cat(three)
        elif not re.search(r"attn\.[kv]_proj", name):
            made[name] = weight
    return made


def prefixed(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": weight.contiguous() for name, weight in weights.items()}
