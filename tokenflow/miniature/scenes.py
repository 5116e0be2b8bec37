"""Rendered scenes with captions, moving on exactly known paths.

A scene is a background and one object in front of it. Each of the two is a *layer*: a texture in
coordinates of its own, and for every frame a similarity transform from pixels to those
coordinates. Because both transforms are known, so is the exact optical flow between any two
frames, and because attributes and motion are independent, the same motion can be rendered with
other attributes: the ground truth of an edit.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

COLORS = {
    "red": (0.85, 0.12, 0.12),
    "yellow": (0.95, 0.85, 0.15),
    "green": (0.10, 0.65, 0.20),
    "blue": (0.12, 0.25, 0.85),
    "purple": (0.60, 0.18, 0.75),
    "white": (0.95, 0.95, 0.95),
}
PATTERNS = ("plain", "striped", "dotted", "checkered")
SHAPES = ("ball", "box", "star", "ring")
BACKGROUNDS = ("grass", "sand", "water", "brick", "snow", "night")
VOCABULARY = {
    "pattern": PATTERNS,
    "color": tuple(COLORS),
    "shape": SHAPES,
    "background": BACKGROUNDS,
}
SIZE = 128


@dataclass(frozen=True)
class Attributes:
    """What a scene shows; `str(attributes)` is its caption."""

    pattern: str
    color: str
    shape: str
    background: str

    def __post_init__(self) -> None:
        for name, words in VOCABULARY.items():
            if getattr(self, name) not in words:
                raise ValueError(f"{name} must be one of {words}, got {getattr(self, name)!r}")

    def __str__(self) -> str:
        return f"a {self.pattern} {self.color} {self.shape} on {self.background}"

    @classmethod
    def parse(cls, caption: str) -> Attributes:
        """Reads "a striped red ball on grass"."""
        match caption.split():
            case ["a", pattern, color, shape, "on", background]:
                return cls(pattern, color, shape, background)
        raise ValueError(f"expected 'a PATTERN COLOR SHAPE on BACKGROUND', got {caption!r}")

    def differing(self, other: Attributes) -> tuple[str, ...]:
        """The names of the attributes in which the two differ."""
        return tuple(n for n in VOCABULARY if getattr(self, n) != getattr(other, n))

    @classmethod
    def every(cls) -> list[Attributes]:
        """All combinations, in a fixed order."""
        return [cls(*words) for words in itertools.product(*VOCABULARY.values())]


@dataclass(frozen=True)
class LayerPath:
    """For each frame the place of one layer: where its origin is, in pixels, its size and angle.

    `x`, `y`, `scale` (pixels per unit of the layer's coordinates) and `angle` (radians) all have
    shape (frames,).
    """

    x: Float[Tensor, " frames"]
    y: Float[Tensor, " frames"]
    scale: Float[Tensor, " frames"]
    angle: Float[Tensor, " frames"]

    def to_layer(self, frame: int, points: Float[Tensor, 2 * shape]) -> Float[Tensor, 2 * shape]:
        """Pixel positions (x, y) in `frame` to the layer's own coordinates."""
        x, y = points[0] - self.x[frame], points[1] - self.y[frame]
        cos, sin = self.angle[frame].cos(), self.angle[frame].sin()
        return torch.stack((x * cos + y * sin, y * cos - x * sin)) / self.scale[frame]

    def to_pixels(self, frame: int, points: Float[Tensor, 2 * shape]) -> Float[Tensor, 2 * shape]:
        """The inverse of `to_layer`."""
        u, v = points * self.scale[frame]
        cos, sin = self.angle[frame].cos(), self.angle[frame].sin()
        return torch.stack((u * cos - v * sin + self.x[frame], u * sin + v * cos + self.y[frame]))


@dataclass(frozen=True)
class Scene:
    """A moving scene: what it shows, how its two layers move, and the seed of its textures."""

    attributes: Attributes
    object: LayerPath
    background: LayerPath
    texture: int
    phase: float

    def __len__(self) -> int:
        return len(self.object.x)

    def with_attributes(self, **changes: str) -> Scene:
        """The same motion and texture seeds with other attributes: the ground truth of an edit."""
        return dataclasses.replace(self, attributes=dataclasses.replace(self.attributes, **changes))

    def render(self, size: int = SIZE) -> Float[Tensor, "frames 3 {size} {size}"]:
        """All frames, float32 in 0..1."""
        return torch.stack([self.frame(i, size) for i in range(len(self))])

    def frame(self, index: int, size: int = SIZE) -> Float[Tensor, "3 {size} {size}"]:
        """One frame, float32 in 0..1."""
        pixels = pixel_grid(size)
        behind = paint_background(
            self.attributes.background, self.background.to_layer(index, pixels), self.texture
        )
        edge = float(self.object.scale[index])
        own = self.object.to_layer(index, pixels)
        front = paint_object(self.attributes, own, self.phase, edge)
        return behind.lerp(front, coverage(self.attributes.shape, own, edge)).clamp(0, 1)

    def mask(self, index: int, size: int = SIZE) -> Float[Tensor, "{size} {size}"]:
        """How much of each pixel the object covers, 0..1."""
        own = self.object.to_layer(index, pixel_grid(size))
        return coverage(self.attributes.shape, own, float(self.object.scale[index]))

    def flow(self, start: int, end: int, size: int = SIZE) -> Float[Tensor, "2 {size} {size}"]:
        """Exact flow in pixels (x, y): what frame `start` shows at p, `end` shows at p + flow."""
        pixels = pixel_grid(size)
        return (
            torch.where(
                self.mask(start, size) > 0.5,
                self.object.to_pixels(end, self.object.to_layer(start, pixels)),
                self.background.to_pixels(end, self.background.to_layer(start, pixels)),
            )
            - pixels
        )

    def visible(self, start: int, end: int, size: int = SIZE) -> Bool[Tensor, "{size} {size}"]:
        """Pixels of frame `start` whose content frame `end` shows too.

        Pixels that mix object and background, in either frame, count as not visible.
        """
        x, y = target = pixel_grid(size) + self.flow(start, end, size)
        inside = (x >= 0) & (y >= 0) & (x <= size - 1) & (y <= size - 1)
        there = coverage(
            self.attributes.shape,
            self.object.to_layer(end, target),
            float(self.object.scale[end]),
        )
        here = self.mask(start, size)
        # one pixel of margin: a bilinear sample beside the outline would mix the layers
        on_object, on_background = (here > 0.98) & (there > 0.98), (here < 0.02) & (there < 0.02)
        return inside & (on_object | on_background)


def random_scene(
    seed: int, frames: int = 1, attributes: Attributes | None = None, size: int = SIZE
) -> Scene:
    """A scene from a seed; without `attributes` they are drawn as well.

    Motion is smooth: constant velocities, turns and zooms of object and background, plus a slow
    sine. The object may leave the frame partly.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator).item()

    drawn = Attributes(
        *(
            words[int(torch.randint(len(words), (), generator=generator))]
            for words in VOCABULARY.values()
        )
    )
    # centred in time, so that the middle of a clip looks like a still
    t = torch.arange(frames, dtype=torch.float32) - (frames - 1) / 2
    sway = uniform(0.0, 2 * math.pi)
    unit = size / SIZE
    obj = LayerPath(
        x=(uniform(34.0, 94.0) + uniform(-2.0, 2.0) * t) * unit,
        y=(uniform(34.0, 94.0) + uniform(-1.2, 1.2) * t + 3 * torch.sin(t / 4 + sway)) * unit,
        scale=uniform(24.0, 38.0) * torch.exp(uniform(-0.012, 0.012) * t) * unit,
        angle=uniform(0.0, 2 * math.pi) + uniform(-0.05, 0.05) * t,
    )
    behind = LayerPath(
        x=(uniform(40.0, 88.0) + uniform(-1.5, 1.5) * t) * unit,
        y=(uniform(40.0, 88.0) + uniform(-0.7, 0.7) * t) * unit,
        scale=torch.exp(uniform(-0.003, 0.003) * t) * unit,
        angle=uniform(-0.003, 0.003) * t,
    )
    return Scene(
        attributes=attributes or drawn,
        object=obj,
        background=behind,
        texture=int(torch.randint(1 << 20, (), generator=generator)),
        phase=uniform(0.0, 2 * math.pi),
    )


def pixel_grid(size: int) -> Float[Tensor, "2 {size} {size}"]:
    """Positions (x, y) of the pixels' centres."""
    axis = torch.arange(size, dtype=torch.float32)
    return torch.stack(torch.meshgrid(axis, axis, indexing="xy"))


def step(distance: Tensor, sharpness: float) -> Tensor:
    """0 to 1 as `distance` crosses zero, over one unit divided by `sharpness` (anti-aliasing)."""
    return (0.5 + distance * sharpness).clamp(0, 1)


def coverage(shape: str, own: Float[Tensor, "2 h w"], edge: float) -> Float[Tensor, "h w"]:
    """The object's share of each pixel; `edge` is the object's scale in pixels per unit."""
    u, v = own
    radius = (u.square() + v.square()).sqrt()
    match shape:
        case "ball":
            outside = radius - 1
        case "box":
            outside = torch.maximum(u.abs(), v.abs()) - 0.85
        case "ring":
            outside = (radius - 0.72).abs() - 0.30
        case _:  # star
            outside = 0.75 * (radius - 1.15 * (0.72 + 0.28 * torch.cos(5 * torch.atan2(v, u))))
    return step(-outside, edge)


def paint_object(
    attributes: Attributes, own: Float[Tensor, "2 h w"], phase: float, edge: float
) -> Float[Tensor, "3 h w"]:
    """The object's colours, with a shade that turns with it."""
    u, v = own
    match attributes.pattern:
        case "plain":
            dark = torch.zeros_like(u)
        case "striped":
            dark = step(torch.sin(8.5 * u + phase), edge / 8.5)
        case "dotted":
            a, b = ((1.7 * own + phase) % 1) - 0.5
            dark = step(0.31 - (a.square() + b.square()).sqrt(), edge / 1.7)
        case _:  # checkered
            a, b = torch.sin(math.pi * (1.9 * own + phase))
            dark = step(a * b, edge / (1.9 * math.pi))
    color = torch.tensor(COLORS[attributes.color])[:, None, None]
    shade = (1 - 0.2 * (0.6 * u + 0.8 * v)).clamp(0.7, 1.2)
    return color.lerp(0.3 * color, dark) * shade


def paint_background(
    kind: str, own: Float[Tensor, "2 h w"], texture: int
) -> Float[Tensor, "3 h w"]:
    """The background's colours at texture coordinates in pixels."""
    x, y = own
    fine, coarse = value_noise(texture, own / 8), value_noise(texture + 1, own / 24)
    noise = 0.5 * fine + 0.5 * coarse

    def between(low: tuple[float, ...], high: tuple[float, ...], share: Tensor) -> Tensor:
        return torch.tensor(low)[:, None, None].lerp(torch.tensor(high)[:, None, None], share)

    match kind:
        case "grass":
            return between((0.15, 0.38, 0.10), (0.36, 0.80, 0.22), noise)
        case "sand":
            return between((0.70, 0.57, 0.34), (0.94, 0.82, 0.56), noise)
        case "water":
            wave = 0.5 + 0.5 * torch.sin(y / 4.5 + 5 * value_noise(texture, own / 16))
            return between((0.08, 0.36, 0.60), (0.30, 0.66, 0.88), 0.5 * noise + 0.5 * wave)
        case "brick":
            row = (y / 14).floor()
            across, up = (x + 14 * (row % 2)) % 28, y % 14
            mortar = 1 - step(torch.minimum(across, 28 - across) - 1.5, 1.0) * step(
                torch.minimum(up, 14 - up) - 1.5, 1.0
            )
            clay = between((0.52, 0.20, 0.13), (0.74, 0.34, 0.24), noise)
            return clay.lerp(torch.tensor((0.75, 0.72, 0.68))[:, None, None], mortar)
        case "snow":
            return between((0.80, 0.85, 0.92), (0.98, 0.99, 1.00), noise)
        case _:  # night
            sky = between((0.03, 0.03, 0.12), (0.10, 0.09, 0.30), noise)
            star = ((value_noise(texture + 2, own / 6) - 0.84) * 8).clamp(0, 1)
            return sky.lerp(torch.tensor((0.90, 0.90, 0.75))[:, None, None], star)


def value_noise(seed: int, points: Float[Tensor, 2 * shape]) -> Float[Tensor, "*shape"]:
    """Smooth noise in 0..1: hashed lattice values, smoothstep between them."""
    corner = points.floor()
    i, j = corner.long()
    fx, fy = (points - corner) ** 2 * (3 - 2 * (points - corner))
    near = hashed(seed, i, j).lerp(hashed(seed, i + 1, j), fx)
    far = hashed(seed, i, j + 1).lerp(hashed(seed, i + 1, j + 1), fx)
    return near.lerp(far, fy)


def hashed(seed: int, i: Int[Tensor, "*shape"], j: Int[Tensor, "*shape"]) -> Tensor:
    """A number in 0..1 for every lattice point (multiply and xorshift)."""
    n = (i * 374761393 + j * 668265263 + seed * 974634777) & 0x7FFFFFFF
    n = ((n ^ (n >> 13)) * 1274126177) & 0x7FFFFFFF
    return ((n ^ (n >> 16)) & 0xFFFF).float() / 0xFFFF
