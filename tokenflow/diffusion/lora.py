"""Low-rank changes of weights (LoRA, Hu et al. 2021, arXiv 2106.09685), fused into the networks.

A layer's weight W becomes W + scale · alpha / rank · up · down. Layers' names, and the time that
they take, stay as they are.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokenflow.diffusion.loading import ModelError, load_pretrained, weights_file
from tokenflow.diffusion.single_file import Checkpoint
from tokenflow.errors import InputError

FILE = "pytorch_lora_weights.safetensors"
"""What diffusers calls it in a folder."""
WEIGHT = re.compile(
    r"(?:(?:\.|_)lora|\.lora_linear_layer)\.(down|up)\.weight$|\.lora_([AB])\.weight$"
)
SIDES = {"down": "down", "A": "down", "up": "up", "B": "up"}
TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
"""A text encoder's projections, as some files call them, and their names."""
OTHER_KINDS = {
    "dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "hada_": "LoHa", "lokr_": "LoKr",
    "lora_mid": "a LoRA with three factors",
}  # fmt: skip
"""Other changes of weights, by what is in their weights' names."""


@dataclass(frozen=True)
class LoRA:
    """One LoRA.

    Args:
        model: A *.safetensors file in kohya's or diffusers' format, a folder with one, or the id of
            a hub model.
        scale: By which its change of the weights is multiplied; may be negative.
    """

    model: str
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise InputError(f"a LoRA's scale is a finite number, got {self.scale}")


@dataclass
class Change:
    """The factors of one layer's change; `alpha` is the rank where it is not given."""

    down: Tensor | None = None
    up: Tensor | None = None
    alpha: float | None = None

    def of(self, weight: Tensor) -> Tensor | None:
        """What is added to a weight, in its shape and in float32; None where it does not fit."""
        if self.down is None or self.up is None:
            return None
        factors = self.down.flatten(1), self.up.flatten(1)
        down, up = (factor.to(weight.device, torch.float32) for factor in factors)
        if (len(up), down.shape[1]) != (len(weight), weight[0].numel()) or up.shape[1] != len(down):
            return None
        alpha = len(down) if self.alpha is None else self.alpha
        return (alpha / len(down) * up @ down).view_as(weight)


def fuse(loras: Sequence[LoRA], networks: Mapping[str, nn.Module], loader: Any, title: str) -> None:
    """Adds several LoRAs to the weights of networks.

    Args:
        loras: Which ones.
        networks: "unet" or "transformer" first, then "text_encoder" and "text_encoder_2", if any.
        loader: diffusers' class that reads files for this family.
        title: What errors call the networks' family.

    Raises:
        ModelError: One is missing, cannot be fetched, or was made for another family; it is of
            another kind, as DoRA or LoHa.
    """
    sums: dict[nn.Parameter, Tensor] = {}
    for lora in loras:
        found, wrong = changes(lora, next(iter(networks.values())), loader, title), []
        for name, change in found.items():
            weight = weight_at(networks, name)
            delta = None if weight is None else change.of(weight)
            if weight is None or delta is None:
                wrong.append(name)
            else:
                sums[weight] = sums.get(weight, torch.zeros_like(delta)) + lora.scale * delta
        if wrong or not found:
            raise ModelError(
                f"the LoRA {lora.model} does not fit the model: {len(wrong)} of its {len(found)} "
                f"layers ({', '.join(wrong[:2]) or 'none is known'}) are not in it or have another "
                f"shape; choose a LoRA that was trained for {title}"
            )
    with torch.no_grad():
        for weight, delta in sums.items():
            weight.copy_(weight.float() + delta)  # once, as the rounding of halves would add up


def weight_at(networks: Mapping[str, nn.Module], name: str) -> nn.Parameter | None:
    """A layer's weight, by its network's name and its own; None where there is none."""
    kind, _, layer = name.partition(".")
    for path in (layer, layer.removeprefix("text_model.")):  # which transformers has left out
        try:
            return networks[kind].get_submodule(path).get_parameter("weight")
        except (KeyError, AttributeError):
            continue
    return None


def changes(lora: LoRA, network: nn.Module, loader: Any, title: str) -> dict[str, Change]:
    """A LoRA's changes by a network's name, as "unet", a point, and the layer's name.

    Raises:
        ModelError: The file is missing, is none of a LoRA's, or of another kind.
    """
    file = weights_file(lora.model, "the LoRA", FILE)
    for name in Checkpoint.read(file).shapes:
        for part, kind in OTHER_KINDS.items():
            if part in name:
                raise ModelError(
                    f"{lora.model} is {kind}, by its weight {name}; expected a LoRA, with two "
                    f"matrices for each layer: convert it, or choose another"
                )
    try:
        weights, *alphas, metadata = load_pretrained(
            loader.lora_state_dict, str(file.parent), "the LoRA", FILE, weight_name=file.name,
            unet_config=network.config, use_safetensors=True, local_files_only=True,
            return_alphas=True, return_lora_metadata=True,
        )  # fmt: skip
    except ModelError as error:  # of another family's layers, whose names cannot be converted
        reason = " ".join(str(error.__cause__).split())
        raise ModelError(
            f"the LoRA {lora.model} does not fit the model: {reason:.200}; choose a LoRA that was "
            f"trained for {title}"
        ) from error
    found: dict[str, Change] = defaultdict(Change)
    for name, weight in weights.items():
        side, one = WEIGHT.search(name), found[layer_of(name)]
        if side is not None:
            setattr(one, SIDES[side[1] or side[2]], weight)
    for name, alpha in ((alphas and alphas[0]) or {}).items():
        found[layer_of(name.removesuffix(".alpha"))].alpha = float(alpha)
    for name, one in found.items():
        if metadata and one.down is not None:
            one.alpha = stated_alpha(metadata, name, len(one.down))
    return dict(found)


def layer_of(weight: str) -> str:
    """The layer that a weight of a LoRA belongs to, by the network's name and its own."""
    kind, _, layer = WEIGHT.sub("", weight).replace(".processor", "").partition(".")
    above, _, last = layer.rpartition(".")
    if kind.startswith("text_encoder"):
        layer = f"{above}.{TEXT.get(last, last)}"
    elif last == "to_out":
        layer = f"{layer}.0"
    return f"{kind}.{layer}"


def stated_alpha(metadata: Mapping[str, Any], layer: str, rank: int) -> float:
    """A layer's alpha by peft's configurations, which diffusers keeps in a file's metadata."""
    kind, _, own = layer.partition(".")
    patterns: Mapping[str, float] = metadata.get(f"{kind}.alpha_pattern") or {}
    stated = next((a for end, a in patterns.items() if f".{own}".endswith(f".{end}")), None)
    alpha = float(metadata.get(f"{kind}.lora_alpha", rank) if stated is None else stated)
    # rank-stabilised: alpha / √rank in place of alpha / rank (arXiv 2312.03732)
    return alpha * math.sqrt(rank) if metadata.get(f"{kind}.use_rslora") else alpha
