"""Scenes in which a bar passes in front of everything."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokenflow.miniature.scenes import SIZE, LayerPath, Scene, pixel_grid, step


@dataclass(frozen=True)
class BarScene(Scene):
    """A scene with a third layer before the others: a grey bar from top to bottom.

    `bar` is its path: x of its middle, half its width as scale; it stands upright.
    """

    bar: LayerPath

    def frame(self, index: int, size: int = SIZE) -> Float[Tensor, "3 {size} {size}"]:
        across, _ = self.bar.to_layer(index, pixel_grid(size))
        grey = (0.45 + 0.1 * across).expand(3, -1, -1)
        return super().frame(index, size).lerp(grey, self.bar_mask(index, size)).clamp(0, 1)

    def mask(self, index: int, size: int = SIZE) -> Float[Tensor, "{size} {size}"]:
        """How much of each pixel shows the object, 0..1."""
        return super().mask(index, size) * (1 - self.bar_mask(index, size))

    def bar_mask(self, index: int, size: int = SIZE) -> Float[Tensor, "{size} {size}"]:
        """How much of each pixel the bar covers, 0..1."""
        return self.bar_at(index, pixel_grid(size))

    def bar_at(self, index: int, points: Float[Tensor, "2 h w"]) -> Float[Tensor, "h w"]:
        """How much the bar covers of pixels at `points` of a frame."""
        across, _ = self.bar.to_layer(index, points)
        return step(1 - across.abs(), float(self.bar.scale[index]))

    def flow(self, start: int, end: int, size: int = SIZE) -> Float[Tensor, "2 {size} {size}"]:
        pixels = pixel_grid(size)
        bar = self.bar.to_pixels(end, self.bar.to_layer(start, pixels)) - pixels
        return torch.where(self.bar_mask(start, size) > 0.5, bar, super().flow(start, end, size))

    def visible(self, start: int, end: int, size: int = SIZE) -> Bool[Tensor, "{size} {size}"]:
        x, y = target = pixel_grid(size) + self.flow(start, end, size)
        inside = (x >= 0) & (y >= 0) & (x <= size - 1) & (y <= size - 1)
        here, there = self.bar_mask(start, size), self.bar_at(end, target)
        behind = super().visible(start, end, size) & (here < 0.02) & (there < 0.02)
        return behind | (inside & (here > 0.98) & (there > 0.98))
