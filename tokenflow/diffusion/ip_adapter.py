"""IP-Adapters (Ye et al. 2023, arXiv 2308.06721): an image as a prompt beside the text's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import layer_norm, linear
from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection

from tokenflow.diffusion.backbone import Backbone
from tokenflow.diffusion.loading import (
    ModelError,
    folder_or_id,
    load_network,
    require_safetensors,
    weights_file,
)
from tokenflow.diffusion.single_file import Checkpoint
from tokenflow.diffusion.unet import UNetBackbone
from tokenflow.storage import digests

FILE = "ip-adapter_sd15.safetensors"
PROJECTION = "image_proj.proj.weight"
PARTS = (PROJECTION, "image_proj.proj.bias", "image_proj.norm.weight", "image_proj.norm.bias")


@dataclass(frozen=True)
class ImagePrompt:
    """What each cross-attention, by name, attends to besides the prompt's tokens.

    Of each tensor the first row is of no image, for the negative branch, the second of the image.
    """

    keys: Mapping[str, Float[Tensor, "2 tokens channels"]]
    values: Mapping[str, Float[Tensor, "2 tokens channels"]]

    @property
    def digest(self) -> str:
        """Of all of it."""
        return digests.of_values(*(digests.of_tensors(dict(x)) for x in (self.keys, self.values)))


@torch.no_grad()
def image_prompt(
    model: str, image_encoder: str, image: Float[Tensor, "3 height width"], backbone: Backbone
) -> ImagePrompt:
    """The keys and values of an image.

    Args:
        model: An IP-Adapter's *.safetensors file, a folder with one, or a hub id.
        image_encoder: The CLIP vision model that it was trained with: a folder in transformers'
            layout, or a hub id.
        image: In 0..1.
        backbone: Whose cross-attentions it is for.

    Raises:
        ModelError: A part is missing, or was made for another model.
    """
    check_family(type(backbone))
    assert isinstance(backbone, UNetBackbone)
    file = weights_file(model, "the IP-Adapter", FILE)
    Checkpoint.read(file)  # refuses what is no safetensors file
    weights = load_file(file)
    if lacking := [name for name in PARTS if name not in weights]:
        raise ModelError(
            f"the IP-Adapter {model} has no {lacking[0]}: expected the plain kind, which projects "
            f"an image's embedding, got Plus, Full Face, FaceID or another file; choose one like "
            f"{FILE}"
        )
    sites, projections = backbone.cross_attention(), dict[str, list[Tensor]]()
    for number, (name, site) in enumerate(sites.items()):
        projections[name] = []
        for side in ("k", "v"):
            one = weights.get(f"ip_adapter.{2 * number + 1}.to_{side}_ip.weight")
            like = site.layer.get_submodule(f"to_{side}").weight
            if one is None or one.shape != like.shape:
                raise ModelError(
                    f"the IP-Adapter {model} was made for another model: expected {len(sites)} "
                    f"layers, the one for {name} of shape {tuple(like.shape)}, got "
                    f"{'none' if one is None else tuple(one.shape)}; choose one for this backbone"
                )
            projections[name].append(one)
    tokens = projected(weights, embedded(image_encoder, image, backbone, weights))
    keys, values = (
        {name: linear(tokens, pair[side].to(tokens)) for name, pair in projections.items()}
        for side in (0, 1)
    )
    return ImagePrompt(keys, values)


def check_family(family: type[Backbone]) -> None:
    """Raises `ModelError` for models without a UNet, whose cross-attention IP-Adapters extend."""
    if not issubclass(family, UNetBackbone):
        raise ModelError(
            f"IP-Adapters are for Stable Diffusion 1.x, 2.x and SDXL, got a {family.__name__}; "
            f"choose such a model, or another editor"
        )


def embedded(
    image_encoder: str,
    image: Float[Tensor, "3 height width"],
    backbone: Backbone,
    weights: Mapping[str, Tensor],
) -> Float[Tensor, "2 dim"]:
    """No image's embedding, zeros, and the image's."""
    folder = folder_or_id(image_encoder, "config.json")
    if Path(folder).is_dir():
        require_safetensors(Path(folder))
    encoder = load_network(
        CLIPVisionModelWithProjection, folder, "the image encoder", "config.json",
        dtype=backbone.dtype, attn_implementation="sdpa",
    ).to(backbone.device).eval()  # fmt: skip
    made, taken = encoder.config.projection_dim, weights[PROJECTION].shape[1]
    if made != taken:
        raise ModelError(
            f"the image encoder {image_encoder} makes embeddings of width {made}, expected "
            f"{taken}, as the IP-Adapter takes; give the encoder that it was trained with"
        )
    side = encoder.config.image_size
    processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=side)
    pixels = (255 * image).round().byte().permute(1, 2, 0).numpy()
    given = processor(pixels, return_tensors="pt")["pixel_values"]
    found = encoder(given.to(backbone.device, backbone.dtype)).image_embeds
    return torch.cat([torch.zeros_like(found), found])


def projected(
    weights: Mapping[str, Tensor], embeddings: Float[Tensor, "2 dim"]
) -> Float[Tensor, "2 tokens width"]:
    """The tokens of embeddings."""
    weight, bias, scale, shift = (weights[name].to(embeddings) for name in PARTS)
    tokens = linear(embeddings, weight, bias).unflatten(1, (-1, len(scale)))
    return layer_norm(tokens, (len(scale),), scale, shift)
