"""CLIP: agreement of frames with a text, and of neighbouring frames with each other."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from tokenflow.diffusion.loading import (
    ModelError,
    load_network,
    load_pretrained,
    require_safetensors,
)
from tokenflow.storage.paths import local
from tokenflow.video import levels

HOLDS = "config.json"


class ClipEmbedder:
    """A CLIP model (Radford et al. 2021): texts and images as vectors of length 1.

    Args:
        model: A folder in transformers' layout, with safetensors.
        device: Where the network runs.

    Raises:
        ModelError: There is no such folder, or it lacks a part.
    """

    def __init__(self, model: str, device: str = "cpu") -> None:
        folder = local(model)
        if not (folder / HOLDS).is_file():
            raise ModelError(
                f"expected a folder with a CLIP model in transformers' layout, but {model!r} has "
                f"no {HOLDS}; download one, like openai/clip-vit-large-patch14, and give its folder"
            )
        require_safetensors(folder)
        self.network = load_network(CLIPModel, str(folder), "CLIP", HOLDS).to(device).eval()
        self.processor = load_pretrained(
            CLIPImageProcessorPil.from_pretrained,
            str(folder),
            "the image processor",
            "preprocessor_config.json",
        )
        self.tokenizer = load_pretrained(
            CLIPTokenizer.from_pretrained, str(folder), "the tokenizer", "tokenizer.json"
        )

    @torch.no_grad()
    def __call__(
        self, frames: Float[Tensor, "frames 3 height width"], text: str
    ) -> tuple[Float[Tensor, "frames dim"], Float[Tensor, " dim"]]:
        """The vectors of each frame, and of the text, of which CLIP reads its first 77 tokens."""
        pixels = levels(frames).movedim(1, -1)
        # the tokenizer's own limit is in a file that may be missing
        most = self.network.config.text_config.max_position_embeddings
        words = self.tokenizer(text, truncation=True, max_length=most, return_tensors="pt")
        images = []
        for some in pixels.split(16):
            inputs = self.processor(list(some.numpy()), return_tensors="pt")
            found = self.network(**inputs.to(self.network.device), **words.to(self.network.device))
            images.append(found.image_embeds.float().cpu())
        return torch.cat(images), found.text_embeds[0].float().cpu()


def text_alignment(
    images: Float[Tensor, "frames dim"], text: Float[Tensor, " dim"]
) -> Float[Tensor, " frames"]:
    """Cosine of each frame's and the text's CLIP vector, which have length 1.

    No unit, -1..1; real pairs have about 0.2 to 0.35. Blind to motion, to count and place, and to
    fine detail; what a text-to-image model makes has an easy time with it.
    Source: Hessel et al. 2021 (arXiv 2104.08718), there clipped at 0 and times 2.5.
    """
    return images @ text


def frame_consistency(images: Float[Tensor, "frames dim"]) -> Float[Tensor, " pairs"]:
    """Cosine of the CLIP vectors of neighbouring frames, which have length 1.

    No unit, -1..1, 1 for equal frames. Blind to flicker of fine texture and to motion: a shuffled
    video does nearly as well, a still one best.
    Source: Esser et al. 2023 (arXiv 2302.03011), section 4.
    """
    return (images[1:] * images[:-1]).sum(dim=1)
