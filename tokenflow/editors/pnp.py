"""Plug-and-Play (Tumanyan et al. 2023, arXiv 2211.12572): the source's layout by its features."""

from __future__ import annotations

from collections.abc import Sequence

from tokenflow.diffusion import Backbone, Schedule, Source, Traits
from tokenflow.diffusion.backbone import Role
from tokenflow.diffusion.flow_transformer import FlowTransformer
from tokenflow.editors.base import Editor, Injection, Start
from tokenflow.errors import InputError
from tokenflow.video import Clip


class PnP(Editor):
    """Injects the source's features, queries and keys into the edited branches.

    Transformers such as SD 3 and Flux have no layers of features: there it is attention alone, with
    its values.

    Args:
        attention: Injection threshold: the share of the steps in which decoder self-attentions
            take the source's queries and keys, 0 to 1. The model's own if not given: 0.5 for Stable
            Diffusion.
        features: Injection threshold: the share of the steps in which decoder layers take the
            source's features, 0 to 1. The model's own if not given: 0.8 for Stable Diffusion.
        feature_layers: How many decoder layers do so, from the one a third of the way up. The
            model's own if not given: 1 for Stable Diffusion; a small model needs more.
        start_from: "inverted" starts at the inverted latent; "renoised" adds the noise that the
            noisiest inverted latent implies to the clean latent, as the published code does.
        inject_values: Whether these self-attentions take the source's values as well. Only where
            the model has no layers of features, if not given.
    """

    def __init__(
        self,
        attention: float | None = None,
        features: float | None = None,
        feature_layers: int | None = None,
        start_from: str = "inverted",
        inject_values: bool | None = None,
    ) -> None:
        for name, share in (("attention", attention), ("features", features)):
            if share is not None and not 0 <= share <= 1:
                raise InputError(f"{name} must be a share of the steps from 0 to 1, got {share}")
        if feature_layers is not None and feature_layers < 1:
            raise InputError(f"feature_layers must be at least 1, got {feature_layers}")
        if start_from not in ("inverted", "renoised"):
            raise InputError(f"start_from must be 'inverted' or 'renoised', got {start_from!r}")
        self.attention, self.features = attention, features
        self.feature_layers, self.start_from = feature_layers, start_from
        self.inject_values = inject_values

    def check_model(self, model: Traits) -> None:
        """Raises `InputError` for features of a transformer."""
        if self.features and issubclass(model.family, FlowTransformer):
            raise no_features(model.family)

    def prepare(self, model: Backbone, clip: Clip) -> None:
        if self.shares(model)[1] > 0 and not model.layers("structure"):
            raise no_features(type(model))

    def shares(self, model: Backbone) -> tuple[float, float]:
        """The thresholds of attention and features, the model's own where none are given."""
        own = model.defaults
        attention = own.attention if self.attention is None else self.attention
        return attention, own.features if self.features is None else self.features

    def start(self, source: Source, schedule: Schedule, seed: int) -> Start:
        if self.start_from == "inverted":
            return Start(source.at(0))
        return Start(schedule.mix(source.clean, source.noise, 0))

    def injections(self, model: Backbone) -> Sequence[Injection]:
        given, (attention, features) = self.feature_layers, self.shares(model)
        count = model.defaults.feature_layers if given is None else given
        structure = model.layers("structure")
        values = not structure if self.inject_values is None else self.inject_values
        roles: tuple[Role, ...] = ("queries", "keys", "values") if values else ("queries", "keys")
        return [
            *(Injection(layer, end=features) for layer in structure[:count]),
            *(Injection(layer, end=attention) for role in roles for layer in model.layers(role)),
        ]


def no_features(family: type[Backbone]) -> InputError:
    """What is said of a family without layers of features."""
    return InputError(
        f"PnP's features are put into layers that hold a picture's layout, and a "
        f"{family.__name__} has none: set features to 0, so that attention alone is injected, or "
        f"take SDEdit"
    )
