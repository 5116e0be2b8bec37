"""Plug-and-Play (Tumanyan et al. 2023, arXiv 2211.12572): the source's layout by its features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor

from tokenflow.diffusion import Schedule, Trajectory
from tokenflow.editors.base import Edit, Editor, Start
from tokenflow.errors import InputError


class PnP(Editor):
    """Injects the source's features, queries and keys into the edited branches.

    Args:
        attention: Share of the steps in which decoder self-attentions take the source's queries
            and keys, 0 to 1.
        features: Share of the steps in which decoder layers take the source's features, 0 to 1.
        feature_layers: How many decoder layers do so, from the one a third of the way up; the
            paper's is 1. A small model needs more of them to keep objects in their places.
        start_from: "inverted" starts at the inverted latent; "renoised" adds the noise that the
            noisiest inverted latent implies to the clean latent, as the published code does.
    """

    def __init__(
        self,
        attention: float = 0.5,
        features: float = 0.8,
        feature_layers: int = 1,
        start_from: str = "inverted",
    ) -> None:
        for name, share in (("attention", attention), ("features", features)):
            if not 0 <= share <= 1:
                raise InputError(f"{name} is a share of the steps from 0 to 1, got {share}")
        if feature_layers < 1:
            raise InputError(f"feature_layers must be at least 1, got {feature_layers}")
        if start_from not in ("inverted", "renoised"):
            raise InputError(f"start_from must be 'inverted' or 'renoised', got {start_from!r}")
        self.attention, self.features = attention, features
        self.feature_layers, self.start_from = feature_layers, start_from

    def start(self, trajectory: Trajectory, schedule: Schedule, seed: int) -> Start:
        first = schedule.timesteps[0]
        if self.start_from == "inverted":
            return Start(trajectory.at(first), schedule.timesteps)
        a = trajectory.noisiest_alpha
        noise = (trajectory.noisiest - a**0.5 * trajectory.clean) / (1 - a) ** 0.5
        a = schedule.alpha(first)
        return Start(a**0.5 * trajectory.clean + (1 - a) ** 0.5 * noise, schedule.timesteps)

    def edits(self, unet: UNet2DConditionModel) -> Sequence[Edit]:
        layers = decoder_layers(unet)[len(decoder_layers(unet)) // 3 :]
        projections = [
            projection
            for layer in layers
            for attention in layer.attentions
            for projection in (attention.to_q, attention.to_k)
        ]
        return [
            *(
                Edit(layer.resnet.conv2, take_source, self.features)
                for layer in layers[: self.feature_layers]
            ),
            *(Edit(projection, take_source, self.attention) for projection in projections),
        ]


class Layer(NamedTuple):
    """One residual block of the decoder and the self-attentions that follow it."""

    resnet: ResnetBlock2D
    attentions: tuple[Attention, ...]


def decoder_layers(unet: UNet2DConditionModel) -> list[Layer]:
    """All layers of the decoder, deepest first.

    Stable Diffusion 1.x and 2.x have twelve. The paper's feature layer is the one a third of the
    way up, index 4, and its attention layers are this one and all above it, 4 to 11.
    """
    layers = []
    for block in unet.up_blocks:
        transformers = getattr(block, "attentions", [None] * len(block.resnets))
        for resnet, transformer in zip(block.resnets, transformers, strict=True):
            blocks = transformer.transformer_blocks if transformer is not None else ()
            layers.append(Layer(resnet, tuple(b.attn1 for b in blocks)))
    return layers


def take_source(edited: Tensor, source: Tensor) -> Tensor:
    """Every edited branch gets the source branch's output."""
    return source.expand_as(edited)
