"""What all families here have in common: a network on a VAE's latents, and text encoders."""

from __future__ import annotations

import inspect
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from diffusers import AutoencoderKL, DDIMScheduler
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from tokenflow.diffusion.backbone import INDEX, Backbone, Defaults, FurtherChannels, Traits
from tokenflow.diffusion.clip import CLIPText
from tokenflow.diffusion.loading import (
    ModelError,
    load_network,
    load_pretrained,
    require_safetensors,
    whole,
)
from tokenflow.diffusion.lora import LoRA, fuse
from tokenflow.diffusion.t5 import T5Text
from tokenflow.diffusion.vae import load_vae
from tokenflow.memory import explained_shortage
from tokenflow.storage import digests

DEFAULTS = "tokenflow.json"
"""A file beside the model's index with the options of an edit that suit it."""
PROJECTIONS = {"queries": "to_q", "keys": "to_k", "values": "to_v"}
Own = TypeVar("Own", bound="LatentDiffusion")


class LatentDiffusion(Backbone):
    """A denoising network, a VAE, text encoders, and a noise schedule.

    Args:
        network: That denoises.
        vae: Between frames and latents.
        texts: The text encoders.
        scheduler: Of the noise that the network was trained on.

    Raises:
        ModelError: The VAE has no usable scale.
    """

    title: ClassVar[str]
    """What errors call the family."""
    components: ClassVar[Mapping[str, Any]]
    """The parts of a folder and their classes, by the names of the constructor's arguments, the
    network first."""
    given: ClassVar[frozenset[str]]
    """The network's arguments that `predict` gives itself."""
    lora_loader: ClassVar[Any]
    """diffusers' class that reads the family's LoRAs."""
    network: Any

    def __init__(
        self,
        network: Any,
        vae: AutoencoderKL,
        texts: Sequence[CLIPText | T5Text],
        scheduler: Any,
    ) -> None:
        self.network, self.texts, self.scheduler = network, tuple(texts), scheduler
        self.own_defaults = self.defaults_of(network.config)
        self.vae = self.checked_vae(vae)
        for one in self.networks:
            one.requires_grad_(False).eval()

    def checked_vae(self, vae: AutoencoderKL) -> AutoencoderKL:
        """The VAE, in the dtype in which it is to compute.

        Raises:
            ModelError: It has no usable scale and shift.
        """
        scale, shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0
        numbers = all(isinstance(value, int | float) for value in (scale, shift))
        if not (numbers and 0 < scale < math.inf and abs(shift) < math.inf):
            raise ModelError(
                f"the VAE's scaling_factor is {scale!r} and its shift_factor {shift!r}, expected a "
                f"number above 0 and another; mend them in vae/config.json (Stable Diffusion 1.x "
                f"and 2.x have 0.18215 and 0)"
            )
        return vae

    def replace_vae(self, vae: str) -> None:
        own = self.checked_vae(load_vae(vae, self.vae, self.dtype).to(self.device))
        self.vae = own.requires_grad_(False).eval()
        if self.device.type == "cpu":
            self.fit_caches()
        self.forget_fingerprint()

    def fuse(self, loras: Sequence[LoRA]) -> None:
        clips = [text.encoder for text in self.texts if isinstance(text, CLIPText)]
        names = next(iter(self.components)), "text_encoder", "text_encoder_2"
        networks = dict(zip(names, (self.network, *clips), strict=False))
        fuse(loras, networks, self.lora_loader, self.title)
        self.forget_fingerprint()

    def forget_fingerprint(self) -> None:
        """After a change of what it is a digest of."""
        vars(self).pop("fingerprint", None)

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """The denoising network, the VAE and the text encoders."""
        return self.network, self.vae, *(text.encoder for text in self.texts)

    @classmethod
    def from_model(cls: type[Own], model: str, device: str, dtype: torch.dtype) -> Own:
        remedy = "take a smaller model, dtype float16 or bfloat16, or a device with more"
        with explained_shortage(f"on {device} for the model {model}", remedy):
            parts = cls.load_parts(model, dtype)
            for name, part in parts.items():
                if isinstance(part, nn.Module):
                    parts[name] = part.to(device)
        backbone = cls(**parts)
        if torch.device(device).type == "cpu":
            backbone.fit_caches()
        if (Path(model) / DEFAULTS).is_file():
            backbone.own_defaults = Defaults.read(Path(model) / DEFAULTS)
        backbone.few_steps = cls.few_steps_of(model)
        return backbone

    @classmethod
    def traits_of(cls, model: str) -> Traits:
        config, file = cls.read_config(model), Path(model) / DEFAULTS
        defaults = Defaults.read(file) if file.is_file() else cls.defaults_of(config)
        few = cls.few_steps_of(model)
        return Traits(cls, config, defaults, cls.channels_of(config), few)

    @classmethod
    def few_steps_of(cls, model: str) -> bool:
        """Whether a model was distilled to few steps, by the class of its scheduler."""
        if Path(model).is_file():
            return False
        load, where = DDIMScheduler.load_config, {"subfolder": "scheduler"}  # of any class
        scheduler = load_pretrained(load, model, "scheduler", INDEX, **where)
        return bool(scheduler.get("_class_name") == "LCMScheduler")

    @classmethod
    def read_config(cls, model: str) -> Mapping[str, Any]:
        """The configuration of a model's denoising network, with what is not stated filled in.

        Raises:
            ModelError: There is none.
        """
        name, kind = next(iter(cls.components.items()))
        return whole(kind, load_pretrained(kind.load_config, model, name, INDEX, subfolder=name))

    @classmethod
    def defaults_of(cls, config: Mapping[str, Any]) -> Defaults:
        """The options of an edit that suit the family, by a network's configuration."""
        return Defaults()

    @classmethod
    def channels_of(cls, config: Mapping[str, Any]) -> FurtherChannels | None:
        """What a network of this configuration takes beside the latents; nothing by default."""
        return None

    @classmethod
    @abstractmethod
    def load_parts(cls, model: str, dtype: torch.dtype) -> dict[str, Any]:
        """The constructor's arguments, of a model in a folder, on the hub, or in a file."""

    @classmethod
    def load_part(cls, model: str, name: str, kind: Any, dtype: torch.dtype) -> Any:
        """One component by its own class, with errors that say what to do."""
        folder = Path(model) / name
        if not issubclass(kind, nn.Module):
            load = cls.read_scheduler if name == "scheduler" else kind.from_pretrained
            return load_pretrained(load, model, name, INDEX, subfolder=name)
        if folder.is_dir():
            require_safetensors(folder)
        options: dict[str, Any] = {"torch_dtype": dtype}  # diffusers'
        if issubclass(kind, PreTrainedModel):
            # said here, or else a model's configuration may name an attention kernel's code on a
            # hub
            options = {"dtype": dtype, "attn_implementation": "sdpa"}  # transformers'
        return load_network(kind, model, name, INDEX, subfolder=name, **options)

    @classmethod
    @abstractmethod
    def read_scheduler(cls, model: str, **options: Any) -> Any:
        """The noise schedule of a folder's or hub model's `scheduler_config.json`."""

    def fit_caches(self) -> None:
        """What is faster on a CPU for the same result (docs/speed.md)."""
        return

    @property
    def device(self) -> torch.device:
        # diffusers' properties search every module for hooks, which takes longer than a small layer
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.network.parameters()).dtype

    @cached_property
    def fingerprint(self) -> str:
        """A digest of weights, configurations, vocabulary, defaults and device.

        All weights are read, once: Stable Diffusion 1.5 takes about 3 s in float32.
        """
        networks = [digests.of_network(part) for part in self.networks]
        schedule = {k: v for k, v in self.scheduler.config.items() if not k.startswith("_")}
        words = [text.vocabulary for text in self.texts]
        own = astuple(self.defaults)
        kind = type(self.scheduler).__name__
        return digests.of_values(networks, words, kind, schedule, own, self.device.type)

    @property
    def latent_scale(self) -> int:
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @torch.no_grad()
    def encode(self, frames: Float[Tensor, "n 3 height width"]) -> Float[Tensor, "n c h w"]:
        """Frames in 0..1 to shifted and scaled latents, the mean of the VAE's posterior."""
        pixels = (2 * frames.to(self.device) - 1).to(self.vae.dtype)
        codes = self.vae.encode(pixels).latent_dist.mean.float()
        return (codes - (self.vae.config.shift_factor or 0.0)) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 height width"]:
        """Shifted and scaled latents to frames in 0..1."""
        codes = latents / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0.0)
        pixels = self.vae.decode(codes.to(self.device, self.vae.dtype)).sample
        return (pixels.float() / 2 + 0.5).clamp(0, 1)

    @cached_property
    def further_inputs(self) -> frozenset[str]:
        names = inspect.signature(type(self.network).forward).parameters.keys()
        return frozenset(names - {"self", "return_dict", *self.given})

    @property
    def defaults(self) -> Defaults:
        return self.own_defaults
