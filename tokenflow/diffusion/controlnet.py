"""ControlNets (Zhang et al. 2023, arXiv 2302.05543) that fit a backbone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import ControlNetModel, SD3ControlNetModel
from jaxtyping import Float
from torch import Tensor

from tokenflow.diffusion.backbone import EMBEDDED, Backbone, Traits
from tokenflow.diffusion.conditioning import Conditioning
from tokenflow.diffusion.loading import (
    ModelError,
    folder_or_id,
    load_network,
    load_pretrained,
    require_safetensors,
    whole,
)
from tokenflow.diffusion.schedule import Timestep
from tokenflow.diffusion.stable_diffusion_3 import StableDiffusion3
from tokenflow.diffusion.unet import UNetBackbone

CONFIG = "config.json"
# may be given once or for each block
PER_BLOCK = ("cross_attention_dim", "layers_per_block")


@dataclass(frozen=True)
class FittedControlNet(ABC):
    """A ControlNet on a backbone's device, in its dtype.

    Attributes:
        network: Of `kind`.
        backbone: The model that it controls.
    """

    kind: ClassVar[Any]
    """The network's class."""
    shared: ClassVar[Mapping[str, str]]
    """The options that network and backbone must have in common, and their names in errors."""
    encodes: ClassVar[bool] = False
    """Whether it sees the latents of control images: `seen`, not these themselves."""

    network: Any
    backbone: Any

    def check(self, name: str) -> None:
        """Raises `ModelError` with all that network and backbone do not have in common."""
        own, config = self.backbone.network.config, self.network.config
        self.require_alike(name, own, config, self.further())

    @classmethod
    def require_alike(
        cls,
        name: str,
        own: Mapping[str, Any],
        config: Mapping[str, Any],
        further: Mapping[str, tuple[Any, Any]],
    ) -> None:
        """Raises `ModelError` for configurations of a model and a ControlNet that do not fit."""
        pairs = {
            word: (found_in(own, option), found_in(config, option))
            for option, word in cls.shared.items()
        }
        wrong = [
            f"{word} {expected} (found {found})"
            for word, (expected, found) in {**pairs, **further}.items()
            if expected != found
        ]
        if wrong:
            raise ModelError(
                f"the ControlNet {name} was made for another model: expected {', '.join(wrong)}; "
                f"choose one that was trained for this backbone"
            )

    @abstractmethod
    def further(self) -> dict[str, tuple[Any, Any]]:
        """What else is expected, and what was found, by its name in errors."""

    def seen(self, images: Float[Tensor, "n 3 height width"]) -> Float[Tensor, "n c h w"]:
        """What the network sees of control images in 0..1: these, or latents where it `encodes`."""
        return images

    @property
    def pools(self) -> bool:
        """Whether it pools its control image over all places."""
        return bool(self.network.config.get("global_pool_conditions"))

    @abstractmethod
    def residuals(
        self,
        latents: Float[Tensor, "n c h w"],
        t: Timestep,
        conditioning: Conditioning,
        seen: Tensor,
        scale: float,
    ) -> Sequence[Tensor]:
        """What is added to the backbone's layers; several networks' add up, one by one."""

    @abstractmethod
    def inputs(self, residuals: Sequence[Tensor]) -> dict[str, Any]:
        """The arguments of the backbone's network that take residuals."""


@dataclass(frozen=True)
class UNetControlNet(FittedControlNet):
    """Of Stable Diffusion 1.x and 2.x, and of SDXL."""

    kind = ControlNetModel
    shared: ClassVar = {
        "cross_attention_dim": "cross-attention width",
        "block_out_channels": "block channels",
        "layers_per_block": "layers per block",
        "in_channels": "latent channels",
        "addition_embed_type": "further embedding",
        "addition_time_embed_dim": "width of a size's embedding",
        "projection_class_embeddings_input_dim": "width of the further embedding",
        "class_embed_type": "class embedding",
        "num_class_embeds": "classes",
    }

    def further(self) -> dict[str, tuple[Any, Any]]:
        config = self.network.config
        halvings = len(config.conditioning_embedding_out_channels) - 1
        return {
            "pixels per latent": (self.backbone.latent_scale, 2**halvings),
            "channels of the control image": (3, config.conditioning_channels),
        }

    def residuals(
        self,
        latents: Float[Tensor, "n c h w"],
        t: Timestep,
        conditioning: Conditioning,
        seen: Tensor,
        scale: float,
    ) -> Sequence[Tensor]:
        """Of the UNet's skip connections and, last, of its middle."""
        given = self.backbone.arguments(conditioning, latents)
        given.pop("timestep_cond", None)  # which ControlNets have no layer for
        down, middle = self.network(
            latents.to(self.network.device, self.network.dtype),
            torch.full((1,), t, device=self.network.device),  # a number would be copied
            **given,
            controlnet_cond=seen.to(self.network.device, self.network.dtype),
            conditioning_scale=scale,
            return_dict=False,
        )
        return [*down, middle]

    def inputs(self, residuals: Sequence[Tensor]) -> dict[str, Any]:
        *down, middle = residuals
        return {
            "down_block_additional_residuals": down,
            "mid_block_additional_residual": middle,
        }


@dataclass(frozen=True)
class StableDiffusion3ControlNet(FittedControlNet):
    """Of Stable Diffusion 3 and 3.5: it sees the control image's latents.

    One without positions of its own has the transformer's, and one without projections of text
    sees none.
    """

    kind = SD3ControlNetModel
    encodes = True
    shared: ClassVar = {
        "in_channels": "latent channels",
        "patch_size": "latent pixels along a patch",
        "num_attention_heads": "attention heads",
        "attention_head_dim": "width of a head",
        "pooled_projection_dim": "width of pooled embeddings",
    }

    def __post_init__(self) -> None:
        if not self.network.config.use_pos_embed:
            self.network.pos_embed = self.backbone.transformer.pos_embed

    def further(self) -> dict[str, tuple[Any, Any]]:
        config = self.network.config
        own = self.backbone.transformer.config
        positions, taken = own.pos_embed_max_size, own.joint_attention_dim
        return {
            "positions along a side": (
                positions, config.pos_embed_max_size if config.use_pos_embed else positions
            ),
            "width of embeddings": (taken, config.joint_attention_dim or taken),
            "further channels of the control image": (0, config.extra_conditioning_channels),
        }  # fmt: skip

    @property
    def as_in_pretraining(self) -> bool:
        """Whether pooled embeddings are zeros, and the control's latents are not shifted."""
        return bool(self.network.config.force_zeros_for_pooled_projection)

    def seen(self, images: Float[Tensor, "n 3 height width"]) -> Float[Tensor, "n c h w"]:
        latents = self.backbone.encode(images)
        if self.as_in_pretraining:
            config = self.backbone.vae.config
            latents = latents + (config.shift_factor or 0.0) * config.scaling_factor
        return latents

    def residuals(
        self,
        latents: Float[Tensor, "n c h w"],
        t: Timestep,
        conditioning: Conditioning,
        seen: Tensor,
        scale: float,
    ) -> Sequence[Tensor]:
        """Of the image tokens after each of the transformer's blocks."""
        network, pooled = self.network, conditioning["pooled"]
        text = network.config.joint_attention_dim is not None
        (found,) = network(
            latents.to(network.device, network.dtype),
            seen.to(network.device, network.dtype),
            conditioning_scale=scale,
            encoder_hidden_states=conditioning["embeddings"] if text else None,
            pooled_projections=torch.zeros_like(pooled) if self.as_in_pretraining else pooled,
            timestep=torch.full((1,), t, device=network.device),
            return_dict=False,
        )
        blocks = len(self.backbone.transformer.transformer_blocks)
        # as the transformer does it; networks of another number of blocks can be added up then
        return [found[int(block / (blocks / len(found)))] for block in range(blocks)]

    def inputs(self, residuals: Sequence[Tensor]) -> dict[str, Any]:
        return {"block_controlnet_hidden_states": list(residuals)}


FITTED: dict[Any, type[FittedControlNet]] = {
    UNetBackbone: UNetControlNet,
    StableDiffusion3: StableDiffusion3ControlNet,
}


def load_controlnet(model: str | Path, backbone: Backbone) -> FittedControlNet:
    """Loads a ControlNet onto a backbone's device, in its dtype.

    Args:
        model: A ControlNet's folder in diffusers' layout, the id of a hub model, or "miniature",
            the embedded one from Canny edges to the miniature's scenes.
        backbone: The model that it is to control.

    Raises:
        ModelError: It is missing, has no safetensors, cannot be fetched, or was made for another
            kind of model than the backbone.
    """
    where, fitted, _ = described(model, type(backbone))
    network = load_network(fitted.kind, where, "the ControlNet", CONFIG, torch_dtype=backbone.dtype)
    network.requires_grad_(False).eval().to(backbone.device)
    found = fitted(network, backbone)
    found.check(str(model))
    return found


def check_controlnet(model: str | Path, traits: Traits) -> None:
    """Raises `ModelError` for a ControlNet that was made for another model, by configurations.

    Nothing is loaded; `load_controlnet` compares what only the other networks tell as well.
    """
    _, fitted, config = described(model, traits.family)
    fitted.require_alike(str(model), traits.config, whole(fitted.kind, config), {})


def described(
    model: str | Path, family: type[Backbone]
) -> tuple[str, type[FittedControlNet], Mapping[str, Any]]:
    """A ControlNet's folder or hub id, the class that fits it to a family, its configuration.

    Raises:
        ModelError: It is missing, has no safetensors, or is for another family.
    """
    fitted = next((kind for base, kind in FITTED.items() if issubclass(family, base)), None)
    if fitted is None:
        raise ModelError(
            f"ControlNets are for Stable Diffusion 1.x, 2.x, 3 and SDXL, got a "
            f"{family.__name__}; choose such a model, or another editor, as SDEdit"
        )
    if model == "miniature":
        model = EMBEDDED["miniature"] / "controlnet"
    model = folder_or_id(str(model), CONFIG)
    if Path(model).is_dir():
        require_safetensors(Path(model))
    kind = fitted.kind
    config = load_pretrained(kind.load_config, model, "the ControlNet", CONFIG)
    if "ControlNet" in (name := str(config.get("_class_name"))) and name != kind.__name__:
        raise ModelError(
            f"the ControlNet {model} is a {name}, which is for another family: expected a "
            f"{kind.__name__}, as a {family.__name__} takes; choose one that was trained for it"
        )
    return model, fitted, config


def found_in(config: Any, field: str) -> Any:
    """A configuration's value, the same from JSON and from Python, for each block and for all."""
    value = config.get(field)
    if not isinstance(value, list | tuple):
        return value
    return value[0] if field in PER_BLOCK and len(set(value)) == 1 else tuple(value)
