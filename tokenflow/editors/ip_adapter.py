"""IP-Adapter (Ye et al. 2023, arXiv 2308.06721): an image says what the edited video shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tokenflow.diffusion import Backbone, Site, Traits
from tokenflow.diffusion.ip_adapter import ImagePrompt, check_family, image_prompt
from tokenflow.editors.base import Batch, Processor
from tokenflow.editors.sdedit import SDEdit
from tokenflow.errors import InputError
from tokenflow.storage.paths import local
from tokenflow.video import Clip, read_clip


class IPAdapter(SDEdit):
    """Starts as SDEdit does; the edited branches attend to an image as they do to their prompts.

    For models with a UNet. Nothing in the network is changed: keys and values of the image are
    computed once for a clip.

    Args:
        model: An IP-Adapter's *.safetensors file of the plain kind, a folder with one, or the id of
            a hub model ("owner/name/file.safetensors").
        image: The image that is the prompt.
        image_encoder: The CLIP vision model that the adapter was trained with: a folder in
            transformers' layout, or the id of a hub model.
        scale: Of what attention to the image adds to that to the text, 0 or more.
        strength: How much of sampling runs, as SDEdit's.
        noise: What the first latent is made of, as SDEdit's.
    """

    def __init__(
        self,
        model: str,
        image: str,
        image_encoder: str,
        scale: float = 1.0,
        strength: float = 0.9,
        noise: str = "inverted",
    ) -> None:
        super().__init__(strength, noise)
        if not 0 <= scale < float("inf"):
            raise InputError(f"an IP-Adapter's scale is a number from 0 up, got {scale}")
        self.model, self.image, self.image_encoder, self.scale = model, image, image_encoder, scale
        self.shown: tuple[Backbone, ImagePrompt] | None = None

    @property
    def needs_source(self) -> bool:
        return False

    @property
    def sees_other_frames(self) -> bool:
        return False

    def check_model(self, model: Traits) -> None:
        """Raises `ModelError` for models without a UNet."""
        check_family(model.family)

    def prepare(self, model: Backbone, clip: Clip) -> None:
        """Loads the adapter, once for a model.

        Raises:
            ModelError: It, or the image encoder, cannot be loaded or was made for another model.
            InputError: The image is none.
        """
        if self.shown is not None and self.shown[0] is model:
            return
        frames = read_clip(local(self.image), max_frames=2).frames
        if len(frames) != 1:
            raise InputError(
                f"the image prompt {self.image} is a video or a folder of several images: expected "
                f"one image; give one of its frames"
            )
        self.shown = model, image_prompt(self.model, self.image_encoder, frames[0], model)

    def cache_key(self, frame: int) -> str:
        """Of the adapter's weights and the image."""
        return self.prepared.digest

    @property
    def prepared(self) -> ImagePrompt:
        """What `prepare` has loaded.

        Raises:
            InputError: It has not been called.
        """
        if self.shown is None:
            raise InputError("an IP-Adapter needs prepare(model, clip) before it is used")
        return self.shown[1]

    def cross_attention(self, model: Backbone) -> Mapping[str, Processor]:
        return dict.fromkeys(self.prepared.keys, self.attend)

    def attend(
        self,
        batch: Batch,
        site: Site,
        hidden_states: Float[Tensor, "rows tokens channels"],
        encoder_hidden_states: Float[Tensor, "rows texts width"],
        **_: Any,
    ) -> Float[Tensor, "rows tokens channels"]:
        """To the prompt, and in the edited branches to the image, or to none for the negative."""
        given, frames = {"encoder_hidden_states": encoder_hidden_states}, len(batch.frames)
        query, key, value = site.qkv(hidden_states, **given)
        attended = scaled_dot_product_attention(query, key, value, scale=site.scale)
        image_keys, image_values = (
            rearrange(each[site.name], "n s (h d) -> n 1 h s d", h=query.shape[1])
            for each in (self.prepared.keys, self.prepared.values)
        )
        for number, branch in enumerate(batch.branches):
            if branch == "source":
                continue
            rows, kind = slice(number * frames, (number + 1) * frames), int(branch != "negative")
            attended[rows] += self.scale * scaled_dot_product_attention(
                query[rows],
                image_keys[kind].expand(frames, -1, -1, -1),
                image_values[kind].expand(frames, -1, -1, -1),
                scale=site.scale,
            )
        return site.output(attended, **given)
