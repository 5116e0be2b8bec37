"""What the flow-matching transformers have in common: Stable Diffusion 3 and Flux."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    ModelMixin,
)
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from tokenflow.diffusion.backbone import INDEX, Backbone, Defaults, Role
from tokenflow.diffusion.clip import CLIPText
from tokenflow.diffusion.loading import (
    ModelError,
    load_network,
    load_pretrained,
    require_safetensors,
)
from tokenflow.diffusion.t5 import T5Text
from tokenflow.memory import explained_shortage
from tokenflow.storage import digests

DEFAULTS = "tokenflow.json"
"""A file beside the model's index with the options of an edit that suit it."""
SCHEDULER = "FlowMatch"
"""How the names of diffusers' samplers begin whose noise is a flow's."""
PROJECTIONS = {"queries": "to_q", "keys": "to_k", "values": "to_v"}


class FlowTransformer(Backbone):
    """A transformer that predicts flow, a VAE, text encoders, and a schedule of the noise's share.

    Args:
        transformer: The denoising network.
        vae: Between frames and latents.
        texts: The text encoders.
        scheduler: Of the noise that the transformer was trained on.

    Raises:
        ModelError: The parts do not fit each other, or this family.
    """

    title: ClassVar[str]
    """What errors call the family."""
    components: ClassVar[Mapping[str, Any]]
    """The parts of a folder and their classes, by the names of the constructor's arguments."""
    optional: ClassVar[frozenset[str]] = frozenset()
    """Those that the model's index may have as [null, null]."""
    given: ClassVar[frozenset[str]]
    """The transformer's arguments that `predict` gives itself."""

    def __init__(
        self,
        transformer: Any,
        vae: AutoencoderKL,
        texts: Sequence[CLIPText | T5Text],
        scheduler: FlowMatchEulerDiscreteScheduler,
        own_defaults: Defaults,
    ) -> None:
        self.transformer, self.vae, self.texts = transformer, vae, tuple(texts)
        self.scheduler, self.own_defaults = scheduler, own_defaults
        self.network = transformer
        self.check_vae()
        for network in self.networks:
            network.requires_grad_(False).eval()

    def check_vae(self) -> None:
        """Raises `ModelError` for a VAE of another model."""
        scale, shift = self.vae.config.scaling_factor, self.vae.config.shift_factor or 0.0
        numbers = all(isinstance(value, int | float) for value in (scale, shift))
        if not (numbers and 0 < scale < math.inf and abs(shift) < math.inf):
            raise ModelError(
                f"the VAE's scaling_factor is {scale!r} and its shift_factor {shift!r}, expected "
                f"a number above 0 and another; mend them in vae/config.json"
            )
        if self.latent_channels != self.vae.config.latent_channels:
            raise ModelError(
                f"the transformer takes {self.latent_channels} channels and the VAE's latents have "
                f"{self.vae.config.latent_channels}; expected parts of one {self.title}, not of "
                f"several models, nor one that fills in or is controlled by further channels"
            )

    def check_widths(self, **pairs: tuple[int, int]) -> None:
        """Raises `ModelError` where what the transformer takes is not what text encoders make.

        Args:
            pairs: The width that is taken and the width that is made, by what it is of.
        """
        for what, (taken, made) in pairs.items():
            if taken != made:
                raise ModelError(
                    f"the transformer takes {what} of width {taken} and the text encoders make "
                    f"{made}; expected parts of one {self.title}, not of several models"
                )

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """The transformer, the VAE and the text encoders."""
        return self.transformer, self.vae, *(text.encoder for text in self.texts)

    @classmethod
    def from_model(cls, model: str, device: str, dtype: torch.dtype) -> FlowTransformer:
        index = load_pretrained(DiffusionPipeline.load_config, model, INDEX, INDEX)
        components = cls.named(index, model)
        remedy = "take a smaller model, dtype float16 or bfloat16, or a device with more"
        with explained_shortage(f"on {device} for the model {model}", remedy):
            parts = {
                name: cls.load_part(model, name, kind, dtype) for name, kind in components.items()
            }
            for name, part in parts.items():
                if isinstance(part, nn.Module):
                    parts[name] = part.to(device)
        backbone = cls(**parts)
        if (Path(model) / DEFAULTS).is_file():
            backbone.own_defaults = Defaults.read(Path(model) / DEFAULTS)
        return backbone

    @classmethod
    def named(cls, index: Mapping[str, Any], model: str) -> dict[str, Any]:
        """The components that a model's index names, with their classes.

        Raises:
            ModelError: One is not named, or has no folder.
        """
        found = {}
        for name, kind in cls.components.items():
            entry = index.get(name)
            if name in cls.optional and entry is not None and not any(entry):
                continue
            without = (
                f", or [null, null] for all of {', '.join(sorted(cls.optional))} to run without"
                if name in cls.optional
                else ""
            )
            if entry is None or not all(entry):
                raise ModelError(
                    f"{INDEX} of the model {model} names no {name}, expected one of class "
                    f"{kind.__name__}{without}; fetch the whole {cls.title}"
                )
            if Path(model).is_dir() and not (Path(model) / name).is_dir():
                raise ModelError(
                    f"the model folder {model} has no {name}/, which its {INDEX} names{without}; "
                    f"expected diffusers' layout with {', '.join(cls.components)}"
                )
            found[name] = kind
        absent = sorted(cls.optional - found.keys())
        if 0 < len(absent) < len(cls.optional):
            raise ModelError(
                f"{INDEX} of the model {model} names no {', '.join(absent)}, expected all of "
                f"{', '.join(sorted(cls.optional))} or none"
            )
        return found

    @classmethod
    def load_part(cls, model: str, name: str, kind: Any, dtype: torch.dtype) -> Any:
        """One component by its own class, with errors that say what to do."""
        folder = Path(model) / name
        if not issubclass(kind, nn.Module):
            load = cls.read_scheduler if name == "scheduler" else kind.from_pretrained
            return load_pretrained(load, model, name, INDEX, subfolder=name)
        if folder.is_dir():
            require_safetensors(folder)
        if issubclass(kind, PreTrainedModel):
            # said here, or else a model's configuration may name an attention kernel's code on a
            # hub
            options: dict[str, Any] = {"dtype": dtype, "attn_implementation": "sdpa"}
        else:
            options = {"torch_dtype": dtype}
            cls.require_class(model, name, kind)
        return load_network(kind, model, name, INDEX, subfolder=name, **options)

    @classmethod
    def require_class(cls, model: str, name: str, kind: type[ModelMixin]) -> None:
        """Raises `ModelError` for a network of diffusers that is of another class."""
        config = load_pretrained(kind.load_config, model, name, INDEX, subfolder=name)
        if (found := config.get("_class_name", kind.__name__)) != kind.__name__:
            raise ModelError(
                f"{name} of the model {model} is a {found}, expected a {kind.__name__}, as "
                f"{cls.title} has; give each part its own model's folder"
            )

    @classmethod
    def read_scheduler(cls, model: str, **options: Any) -> FlowMatchEulerDiscreteScheduler:
        """Euler's steps with the noise of a folder's or hub model's `scheduler_config.json`.

        Raises:
            ModelError: Its noise is not a flow's.
        """
        kind = FlowMatchEulerDiscreteScheduler
        config = kind.load_config(model, **options)
        name = str(config.get("_class_name"))
        if not name.startswith(SCHEDULER) or config.get("invert_sigmas"):
            inverted = " with invert_sigmas" if config.get("invert_sigmas") else ""
            raise ModelError(
                f"the scheduler is {name}{inverted}, expected one of diffusers' {SCHEDULER}..., as "
                f"{cls.title} has: use the file of the model that this one was made from"
            )
        return kind.from_config(config)

    @property
    def device(self) -> torch.device:
        return self.transformer.device

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.dtype

    @cached_property
    def fingerprint(self) -> str:
        """A digest of weights, configurations, vocabulary, defaults and device.

        All weights are read, once, at about 1.4 GB/s.
        """
        networks = [digests.of_network(part) for part in self.networks]
        schedule = {k: v for k, v in self.scheduler.config.items() if not k.startswith("_")}
        words = [text.vocabulary for text in self.texts]
        own = astuple(self.defaults)
        return digests.of_values(networks, words, schedule, own, self.device.type)

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
        names = inspect.signature(type(self.transformer).forward).parameters.keys()
        return frozenset(names - {"self", "return_dict", *self.given})

    def layers(self, role: Role) -> Sequence[str]:
        """The projections of image tokens of all blocks in which text has projections of its own.

        "structure" is empty: all blocks are of one resolution, and none is known to hold a
        picture's layout alone.
        """
        if role == "structure":
            return []
        blocks = range(len(self.transformer.transformer_blocks))
        return [f"transformer_blocks.{block}.attn.{PROJECTIONS[role]}" for block in blocks]

    @property
    def defaults(self) -> Defaults:
        return self.own_defaults
