"""Plug-and-Play (Tumanyan et al. 2023, arXiv 2211.12572): the source's layout by its features."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tokenflow.diffusion import Backbone, Schedule, Source
from tokenflow.editors.base import Batch, Editor, Injection, Start
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

    def start(self, source: Source, schedule: Schedule, seed: int) -> Start:
        if self.start_from == "inverted":
            return Start(source.at(0))
        return Start(schedule.mix(source.clean, source.noise, 0))

    def injections(self, model: Backbone) -> Sequence[Injection]:
        structure = model.layers("structure")[: self.feature_layers]
        projections = [*model.layers("queries"), *model.layers("keys")]
        return [
            *(Injection(layer, take_source, end=self.features) for layer in structure),
            *(Injection(layer, take_source, end=self.attention) for layer in projections),
        ]


def take_source(edited: Tensor, source: Tensor, batch: Batch) -> Tensor:
    """Every edited branch gets the source branch's output."""
    return source.expand_as(edited)
