"""A flow-matching model without training: the velocity of Gaussian latents in closed form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from tokenflow.diffusion import Backbone, Conditioning, Schedule, Site


class Tokens(nn.Module):
    """Attention among a frame's latent pixels, whose processor can be replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.by: Any = None

    def forward(self, x: Tensor) -> Tensor:
        site = OneHead("tokens", self)
        return site.plain(x) if self.by is None else self.by.attention(site, x)


class OneHead(Site):
    def __init__(self, name: str, layer: Tokens) -> None:
        super().__init__(name)
        self.layer = layer

    def qkv(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
        x = hidden_states[:, None]
        return x, x, x

    def output(self, attended: Tensor, **_: Any) -> Tensor:
        return attended[:, 0]

    def plain(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return self.output(scaled_dot_product_attention(*self.qkv(hidden_states)))

    @contextmanager
    def replaced(self, by: Any) -> Iterator[None]:
        self.layer.by = by
        try:
            yield
        finally:
            self.layer.by = None


class GaussianFlow(Backbone):
    """Latents are N(mean, std²), the mean a number in the prompt; `share` of attention is added.

    With x = (1 - σ) x0 + σ n the velocity E[n - x0 | x] is linear in x, and its path is known:
    x_σ = (1 - σ) mean + (x_0 - mean) · √((1 - σ)² std² + σ²) / std.
    """

    latent_channels, latent_scale, multiple, size, fingerprint = 3, 1, 1, 4, "gaussian"
    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, std: float = 0.7, share: float = 0.0) -> None:
        self.std, self.share = std, share
        self.network = nn.ModuleDict({"tokens": Tokens()})

    @classmethod
    def from_model(cls, model: str, device: str, dtype: torch.dtype) -> GaussianFlow:
        return cls()

    def schedule(self, steps: int, size: tuple[int, int] | None = None) -> Schedule:
        noise = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
        return Schedule(tuple(noise[:-1]), tuple(1 - s for s in noise), tuple(noise), "flow")

    def embed(self, prompts: Sequence[str]) -> Conditioning:
        return Conditioning(mean=torch.tensor([float(prompt or 0) for prompt in prompts]))

    def encode(self, frames: Tensor) -> Tensor:
        return frames.float()

    def decode(self, latents: Tensor) -> Tensor:
        return latents.float()

    def predict(self, latents: Tensor, t: float, conditioning: Conditioning, **_: Any) -> Tensor:
        mean = conditioning["mean"].view(-1, 1, 1, 1)
        signal, variance = 1 - t, (1 - t) ** 2 * self.std**2 + t**2
        centred = latents - signal * mean
        velocity = (t - signal * self.std**2) / variance * centred - mean
        tokens = self.network["tokens"](latents.flatten(2).transpose(1, 2)).transpose(1, 2)
        return velocity + self.share * tokens.view_as(latents)

    further_inputs: frozenset[str] = frozenset()

    def sites(self) -> Mapping[str, Site]:
        return {"tokens": OneHead("tokens", self.network["tokens"])}

    def layers(self, role: str) -> Sequence[str]:
        return ["tokens"] if role == "structure" else []

    def path(self, clean: Tensor, mean: float, sigma: float) -> Tensor:
        """Where the flow takes a clean latent at the noise level σ."""
        spread = ((1 - sigma) ** 2 * self.std**2 + sigma**2) ** 0.5 / self.std
        return (1 - sigma) * mean + (clean - mean) * spread
