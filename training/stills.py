"""The training set: one still of each training seed, rendered, encoded and drawn in edges."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.utils.data import IterableDataset

from tokenflow.editors import Canny
from tokenflow.miniature import scenes
from tokenflow.miniature.scenes import SIZE, Attributes, random_scene

SCENES = 12_288  # seeds 0 .. SCENES - 1 are for training; evaluation uses seeds from a million up


class Endless(IterableDataset[tuple[Tensor, ...]]):
    """Batches drawn for ever from tensors of equal length."""

    def __init__(self, *tensors: Tensor, batch: int) -> None:
        self.tensors, self.batch = tensors, batch

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        while True:
            chosen = torch.randint(len(self.tensors[0]), (self.batch,))
            yield tuple(tensor[chosen] for tensor in self.tensors)


def to_signed(images: UInt8[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Bytes to the -1..1 that autoencoders take."""
    return images.float() / 127.5 - 1


def version() -> str:
    """A short name of how scenes are rendered: other code, other stills."""
    return sha256(Path(scenes.__file__).read_bytes()).hexdigest()[:8]


def rendered(folder: Path) -> UInt8[Tensor, "scenes 3 height width"]:
    """One still of each training seed, rendered once."""
    file = folder / f"images-{version()}.pt"
    if not file.exists():
        images = [(random_scene(seed).frame(0) * 255).round().byte() for seed in range(SCENES)]
        torch.save(torch.stack(images), file)
    return torch.load(file)


def encoded(folder: Path, vae: AutoencoderKL) -> Float[Tensor, "scenes 4 height width"]:
    """The training stills' scaled latents, encoded once."""
    file = folder / f"latents-{version()}.pt"
    if not file.exists():
        with torch.inference_mode():
            parts = [
                vae.encode(to_signed(part)).latent_dist.mean for part in rendered(folder).split(32)
            ]
        torch.save(torch.cat(parts) * vae.config.scaling_factor, file)
    return torch.load(file)


def near_objects(size: int) -> Float[Tensor, "scenes 1 {size} {size}"]:
    """1 in the training stills' objects and up to a third of their radius around, 0 elsewhere.

    A disc, so that it does not tell the shape.
    """
    axis = (torch.arange(size) + 0.5) * (SIZE / size) - 0.5
    found = []
    for path in (random_scene(seed).object for seed in range(SCENES)):
        distance = torch.hypot(axis - path.x[0], axis[:, None] - path.y[0])
        found.append(distance < 1.35 * path.scale[0])
    return torch.stack(found)[:, None].float()


def canny_edges(
    images: UInt8[Tensor, "scenes 3 height width"],
) -> UInt8[Tensor, "scenes 1 height width"]:
    """What `Canny` with its default thresholds shows of images, as bytes."""
    canny = Canny()
    return torch.stack([(255 * canny.edges(image / 255)[:1]).byte() for image in images])


def without_shape(attributes: Attributes) -> str:
    """A caption without the shape; a filler keeps the other words in their places."""
    return str(attributes).replace(attributes.shape, "a")
