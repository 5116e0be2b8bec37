"""ControlNets (Zhang et al. 2023, arXiv 2302.05543) that fit a backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import ControlNetModel

from tokenflow.diffusion.backbone import EMBEDDED, Backbone
from tokenflow.diffusion.loading import (
    ModelError,
    folder_or_id,
    load_network,
    require_safetensors,
)
from tokenflow.diffusion.stable_diffusion import StableDiffusion

# what makes a ControlNet's inputs and residuals the UNet's
SHARED = {
    "cross_attention_dim": "cross-attention width",
    "block_out_channels": "block channels",
    "layers_per_block": "layers per block",
    "in_channels": "latent channels",
    "addition_embed_type": "further embedding",
    "class_embed_type": "class embedding",
    "num_class_embeds": "classes",
}

# may be given once or for each block
PER_BLOCK = ("cross_attention_dim", "layers_per_block")


def load_controlnet(model: str | Path, backbone: Backbone) -> ControlNetModel:
    """Loads a ControlNet onto a backbone's device, in its dtype.

    Args:
        model: A ControlNet's folder in diffusers' layout, the id of a hub model, or "miniature",
            the embedded one from Canny edges to the miniature's scenes.
        backbone: The model that it is to control.

    Raises:
        ModelError: It is missing, has no safetensors, cannot be fetched, or was made for another
            kind of model than the backbone.
    """
    if not isinstance(backbone, StableDiffusion):
        raise ModelError(
            f"ControlNets are for Stable Diffusion 1.x and 2.x, got a {type(backbone).__name__}; "
            f"choose such a model, or another editor, as SDEdit"
        )
    if model == "miniature":
        model = EMBEDDED / "controlnet"
    model = folder_or_id(str(model), "config.json")
    if Path(model).is_dir():
        require_safetensors(Path(model))
    network = load_network(
        ControlNetModel, str(model), "the ControlNet", "config.json", torch_dtype=backbone.dtype
    )
    check_fit(network, backbone, str(model))
    return network.requires_grad_(False).eval().to(backbone.device)


def check_fit(network: ControlNetModel, backbone: StableDiffusion, name: str) -> None:
    """Raises `ModelError` with all that a ControlNet and a backbone do not have in common."""
    pairs = {
        word: (found_in(backbone.unet.config, field), found_in(network.config, field))
        for field, word in SHARED.items()
    }
    halvings = len(network.config.conditioning_embedding_out_channels) - 1
    pairs["pixels per latent"] = (backbone.latent_scale, 2**halvings)
    pairs["channels of the control image"] = (3, network.config.conditioning_channels)
    wrong = [
        f"{word} {expected} (found {found})"
        for word, (expected, found) in pairs.items()
        if expected != found
    ]
    if wrong:
        raise ModelError(
            f"the ControlNet {name} was made for another model: expected {', '.join(wrong)}; "
            f"choose one that was trained for this backbone"
        )


def found_in(config: Any, field: str) -> Any:
    """A configuration's value, the same from JSON and from Python, for each block and for all."""
    value = config.get(field)
    if not isinstance(value, list | tuple):
        return value
    return value[0] if field in PER_BLOCK and len(set(value)) == 1 else tuple(value)
