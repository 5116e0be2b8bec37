"""What the flow-matching transformers have in common: Stable Diffusion 3 and Flux."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    ModelMixin,
)

from tokenflow.diffusion.backbone import INDEX, Role
from tokenflow.diffusion.clip import CLIPText
from tokenflow.diffusion.latent_diffusion import PROJECTIONS, LatentDiffusion
from tokenflow.diffusion.loading import ModelError, load_pretrained
from tokenflow.diffusion.t5 import T5Text

SCHEDULER = "FlowMatch"
"""How the names of diffusers' samplers begin whose noise is a flow's."""


class FlowTransformer(LatentDiffusion):
    """A transformer that predicts flow, a VAE, text encoders, and a schedule of the noise's share.

    Args:
        transformer: The denoising network.
        vae: Between frames and latents.
        texts: The text encoders.
        scheduler: Of the noise that the transformer was trained on.

    Raises:
        ModelError: The parts do not fit each other, or this family.
    """

    optional: ClassVar[frozenset[str]] = frozenset()
    """Those that the model's index may have as [null, null]."""

    def __init__(
        self,
        transformer: Any,
        vae: AutoencoderKL,
        texts: Sequence[CLIPText | T5Text],
        scheduler: FlowMatchEulerDiscreteScheduler,
    ) -> None:
        self.transformer = transformer
        super().__init__(transformer, vae, texts, scheduler)
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

    @classmethod
    def load_parts(cls, model: str, dtype: torch.dtype) -> dict[str, Any]:
        index = load_pretrained(DiffusionPipeline.load_config, model, INDEX, INDEX)
        components = cls.named(index, model)
        return {name: cls.load_part(model, name, kind, dtype) for name, kind in components.items()}

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
        if issubclass(kind, ModelMixin):
            cls.require_class(model, name, kind)
        return super().load_part(model, name, kind, dtype)

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

    def layers(self, role: Role) -> Sequence[str]:
        """The projections of image tokens of all blocks in which text has projections of its own.

        "structure" is empty: all blocks are of one resolution, and none is known to hold a
        picture's layout alone.
        """
        if role == "structure":
            return []
        blocks = range(len(self.transformer.transformer_blocks))
        return [f"transformer_blocks.{block}.attn.{PROJECTIONS[role]}" for block in blocks]
