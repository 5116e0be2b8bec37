"""What the families with a UNet have in common: Stable Diffusion 1.x and 2.x, SDXL."""

from __future__ import annotations

import inspect
import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.resnet import ResnetBlock2D
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from tokenflow.diffusion.backbone import INDEX, Backbone, Defaults, Role
from tokenflow.diffusion.clip import CLIPText
from tokenflow.diffusion.conditioning import Conditioning
from tokenflow.diffusion.loading import (
    ModelError,
    load_network,
    load_pretrained,
    require_safetensors,
)
from tokenflow.diffusion.lora import LoRA, fuse
from tokenflow.diffusion.schedule import Schedule, Timestep
from tokenflow.diffusion.scheduler import check_noise, read_scheduler
from tokenflow.diffusion.single_file import load_parts
from tokenflow.diffusion.sites import DiffusersSite
from tokenflow.diffusion.textual_inversion import Embedding, add
from tokenflow.diffusion.vae import load_vae
from tokenflow.memory import explained_shortage
from tokenflow.storage import digests

DEFAULTS = "tokenflow.json"
"""A file beside the model's index with the options of an edit that suit it."""
# what makes a UNet ask for further inputs
FURTHER = (
    "addition_embed_type",
    "class_embed_type",
    "num_class_embeds",
    "encoder_hid_dim",
    "encoder_hid_dim_type",
)
TOLD = 8.5
"""The scale of guidance by default where the UNet is told it, as in diffusers' pipeline."""
VOCABULARIES = ({"tokenizer.json"}, {"vocab.json", "merges.txt"})
OWN = {
    "self", "sample", "timestep", "encoder_hidden_states", "added_cond_kwargs", "timestep_cond",
    "return_dict",
}  # fmt: skip
"""The UNet's arguments that `predict` gives itself."""


Own = TypeVar("Own", bound="UNetBackbone")


class UNetBackbone(Backbone):
    """A UNet that predicts noise or v, a VAE, CLIP text encoders, and a noise schedule by betas.

    Args:
        unet: The denoising network.
        vae: Between frames and latents.
        texts: The text encoders, in the order in which their embeddings stand beside each other.
        scheduler: Of the noise that the UNet was trained on.

    Raises:
        ModelError: The parts do not fit each other, or this family.
    """

    title: ClassVar[str]
    """What errors call the family."""
    components: ClassVar[Mapping[str, Any]]
    """The parts of a folder and their classes, by the names of the constructor's arguments."""
    taken: ClassVar[Mapping[str, Any]] = {}
    """Of a UNet's configuration, further inputs that this family gives it."""

    own_defaults = Defaults()
    chunked: frozenset[str] = frozenset()
    """The transformer blocks whose feed-forward layer takes image by image, by name."""
    compiled: frozenset[str] = frozenset()
    """Those whose feed-forward layer is compiled."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        texts: Sequence[CLIPText],
        scheduler: DDIMScheduler,
    ) -> None:
        prediction = scheduler.config.prediction_type
        if prediction not in ("epsilon", "v_prediction"):
            raise ModelError(
                f"the scheduler predicts {prediction!r}, expected 'epsilon' or 'v_prediction'"
            )
        self.check_unet(unet, vae, sum(text.width for text in texts))
        check_noise(scheduler)
        self.unet, self.texts, self.scheduler = unet, tuple(texts), scheduler
        self.vae = self.checked_vae(vae)
        self.network = unet
        if unet.config.time_cond_proj_dim is not None:
            self.own_defaults = replace(self.own_defaults, guidance=TOLD)
        for network in self.networks:
            network.requires_grad_(False).eval()

    @classmethod
    def check_unet(cls, unet: UNet2DConditionModel, vae: AutoencoderKL, width: int) -> None:
        """Raises `ModelError` unless a UNet takes what this family gives it.

        Args:
            unet: The network.
            vae: Whose latents it takes.
            width: Of the text encoders' embeddings beside each other.
        """
        if unet.config.in_channels != vae.config.latent_channels:
            raise ModelError(
                f"the UNet takes {unet.config.in_channels} channels and the VAE's latents have "
                f"{vae.config.latent_channels}; models for inpainting or upscaling do not fit"
            )
        asked = {name: value for name in FURTHER if (value := unet.config.get(name))}
        if asked != cls.taken:
            found = ", ".join(f"{name} {value!r}" for name, value in asked.items())
            raise ModelError(
                f"the UNet needs other inputs than those of {cls.title} ({found or 'no further'}), "
                f"as those of unCLIP do; expected {cls.title}"
            )
        blocks = (block for name, block in unet.named_modules() if name.endswith(".attn1"))
        if any(block.is_cross_attention for block in blocks):
            raise ModelError(
                f"the UNet has only cross-attention, none among a frame's tokens, in which a "
                f"video's frames could take part; expected {cls.title}"
            )
        taken = unet.config.cross_attention_dim
        if {width} != set(taken if isinstance(taken, list | tuple) else [taken]):
            raise ModelError(
                f"the UNet takes embeddings of width {taken} and the text encoder makes {width}; "
                f"expected parts of one {cls.title}, not of several models"
            )

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """The UNet, the VAE and the text encoders."""
        return self.unet, self.vae, *(text.encoder for text in self.texts)

    def checked_vae(self, vae: AutoencoderKL) -> AutoencoderKL:
        """The VAE, in the dtype in which it is to compute; `ModelError` without a usable scale."""
        scale = vae.config.scaling_factor
        if not isinstance(scale, int | float) or not 0 < scale < math.inf:
            raise ModelError(
                f"the VAE's scaling_factor is {scale!r}, expected a number above 0; mend it in "
                f"vae/config.json (Stable Diffusion 1.x and 2.x have 0.18215, SDXL 0.13025)"
            )
        return vae.requires_grad_(False).eval()

    def replace_vae(self, vae: str) -> None:
        own = load_vae(vae, self.vae, self.dtype)
        self.vae = self.checked_vae(own.to(self.device))
        if self.device.type == "cpu":
            self.vae.decoder.to(memory_format=torch.channels_last)

    def add_embeddings(self, embeddings: Sequence[Embedding]) -> None:
        add(embeddings, self.texts, self.title)

    def fuse(self, loras: Sequence[LoRA]) -> None:
        networks = {"unet": self.unet, "text_encoder": self.texts[0].encoder}
        if len(self.texts) > 1:
            networks["text_encoder_2"] = self.texts[1].encoder
        fuse(loras, networks, self.title)

    @classmethod
    def from_model(cls: type[Own], model: str, device: str, dtype: torch.dtype) -> Own:
        if Path(model).is_dir():
            check_folder(Path(model), cls.components)
        remedy = "take a smaller model, dtype float16 or bfloat16, or a device with more"
        with explained_shortage(f"on {device} for the model {model}", remedy):
            if Path(model).is_file():
                parts = load_parts(model, cls.components, dtype)
            else:
                parts = {
                    name: load_component(model, name, kind, dtype)
                    for name, kind in cls.components.items()
                }
            for name, part in parts.items():
                if isinstance(part, nn.Module):
                    parts[name] = part.to(device)
        backbone = cls(**parts, **cls.options(model))
        if torch.device(device).type == "cpu":
            backbone.fit_caches()
        if (Path(model) / DEFAULTS).is_file():
            backbone.own_defaults = Defaults.read(Path(model) / DEFAULTS)
        return backbone

    @classmethod
    def options(cls, model: str) -> dict[str, Any]:
        """The constructor's arguments besides the components, as a model's index has them."""
        return {}

    def fit_caches(self) -> None:
        """What is faster on a CPU for the same result (docs/speed.md).

        The VAE's decoder takes channels last, and the transformers of the highest resolution go
        through their feed-forward layer image by image: its wide tokens stay in the cache. The
        encoder is left as it is: an edit's matches magnify what rounding does to its latents.
        """
        self.vae.decoder.to(memory_format=torch.channels_last)
        width = self.unet.config.block_out_channels[0]
        blocks = {n: block for n, block in self.transformer_blocks().items() if block.dim == width}
        for block in blocks.values():
            block.set_chunk_feed_forward(1, dim=0)
        self.chunked = frozenset(blocks)

    def transformer_blocks(self) -> dict[str, BasicTransformerBlock]:
        """The UNet's, by name."""
        modules = self.unet.named_modules()
        return {name: one for name, one in modules if isinstance(one, BasicTransformerBlock)}

    @torch.no_grad()
    def compile(self) -> None:
        """The transformers' feed-forward layers, whose programs are shared by layers of one width.

        Of all blocks they gain most, and they hold no layer that editors change (docs/speed.md).
        """
        blocks = self.transformer_blocks()
        try:
            for block in blocks.values():
                block.ff.compile(dynamic=True)
                for images in (1, 2):  # one alone has a program of its own
                    # sizes that differ, so that the program takes none of them for another
                    size = images, 3, block.dim
                    block.ff(torch.zeros(size, device=self.device, dtype=self.dtype))
        except Exception as error:  # of a compiler's process, of many kinds
            raise ModelError(
                f"the network cannot be compiled on {self.device}: {type(error).__name__}: {error};"
                f" install a C++ compiler, or leave compile at false"
            ) from error
        self.compiled = frozenset(blocks)

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    @cached_property
    def fingerprint(self) -> str:
        """A digest of weights, configurations, vocabulary, defaults and device.

        All weights are read, once: Stable Diffusion 1.5 takes about 3 s in float32.
        """
        networks = [digests.of_network(part) for part in self.networks]
        schedule = {k: v for k, v in self.scheduler.config.items() if not k.startswith("_")}
        words = [text.vocabulary for text in self.texts]
        own = astuple(self.defaults)
        return digests.of_values(networks, words, schedule, own, self.device.type)

    @property
    def latent_scale(self) -> int:
        """How many pixels wide one latent is."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def multiple(self) -> int:
        """What frames' height and width must be multiples of: the UNet's deepest latent."""
        return int(self.latent_scale * 2 ** (len(self.unet.config.block_out_channels) - 1))

    @property
    def size(self) -> int:
        return int(self.unet.config.sample_size)

    @property
    def latent_channels(self) -> int:
        return int(self.unet.config.in_channels)

    def schedule(self, steps: int, size: tuple[int, int] | None = None) -> Schedule:
        return Schedule.from_ddim(self.scheduler, steps)

    @torch.no_grad()
    def encode(self, frames: Float[Tensor, "n 3 height width"]) -> Float[Tensor, "n c h w"]:
        """Frames in 0..1 to scaled latents, the mean of the VAE's posterior."""
        pixels = (2 * frames.to(self.device) - 1).to(self.vae.dtype)
        return self.vae.encode(pixels).latent_dist.mean.float() * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 height width"]:
        """Scaled latents to frames in 0..1."""
        codes = (latents / self.vae.config.scaling_factor).to(self.device, self.vae.dtype)
        return (self.vae.decode(codes).sample.float() / 2 + 0.5).clamp(0, 1)

    def predict(
        self,
        latents: Float[Tensor, "n c h w"],
        t: Timestep,
        conditioning: Conditioning,
        **inputs: Any,
    ) -> Float[Tensor, "n c h w"]:
        output = self.unet(
            latents.to(self.device, self.dtype),
            torch.full((1,), t, device=self.device),  # a number would be copied, and waited for
            **self.told(conditioning, latents),
            **inputs,
        )
        return output.sample.float()

    def told(self, conditioning: Conditioning, latents: Float[Tensor, "n c h w"]) -> dict[str, Any]:
        """The UNet's arguments besides latents and time, and a ControlNet's of the same family."""
        told: dict[str, Any] = {"encoder_hidden_states": conditioning["embeddings"]}
        if "guidance" in conditioning:
            excess = 1000 * (conditioning["guidance"] - 1)
            width = self.unet.config.time_cond_proj_dim
            embedding = get_timestep_embedding(excess, width, downscale_freq_shift=1)
            told["timestep_cond"] = embedding.to(self.dtype)
        return told

    def conditioning(self, **tensors: Tensor) -> Conditioning:
        """The text encoders' output, and a "guidance" of 1 for a UNet that embeds its scale.

        Source: Meng et al. 2023 (arXiv 2210.03142), section 3.1.
        """
        if self.unet.config.time_cond_proj_dim is not None:
            tensors["guidance"] = torch.ones(len(tensors["embeddings"]), device=self.device)
        return Conditioning(**tensors)

    @cached_property
    def further_inputs(self) -> frozenset[str]:
        return frozenset(inspect.signature(type(self.unet).forward).parameters.keys() - OWN)

    def sites(self) -> Mapping[str, DiffusersSite]:
        return attention_sites(self.unet, "attn1")

    def cross_attention(self) -> Mapping[str, DiffusersSite]:
        return attention_sites(self.unet, "attn2")

    @abstractmethod
    def decoder(self) -> Sequence[tuple[str, list[str]]]:
        """The decoder's layers that hold the layout, deepest first, of `decoder_layers`."""

    def layers(self, role: Role) -> Sequence[str]:
        chosen = self.decoder()
        if role == "structure":
            return [resnet for resnet, _ in chosen]
        projection = PROJECTIONS[role]
        return [f"{site}.{projection}" for _, sites in chosen for site in sites]

    def entries(self, layer: str) -> Sequence[str]:
        """Of a residual block's last convolution: where latents and the time's embedding enter."""
        name, _, last = layer.rpartition(".")
        if last in PROJECTIONS.values() and name.endswith(".attn1"):
            return (layer,)
        block = self.unet.get_submodule(name)
        plain = type(block) is ResnetBlock2D and block.upsample is block.downsample is None
        if last == "conv2" and plain and block.time_emb_proj is not None:
            return (f"{name}.norm1", f"{name}.time_emb_proj")
        return ()

    @contextmanager
    def hooked(self, layer: str) -> Iterator[None]:
        name, inside, _ = f"{layer}.".partition(".ff.")
        if inside and name in self.compiled:
            raise ModelError(f"{layer} is compiled; an editor that changes it needs compile false")
        chunked = inside and name in self.chunked
        if chunked:
            self.unet.get_submodule(name).set_chunk_feed_forward(None)
        try:
            yield
        finally:
            if chunked:
                self.unet.get_submodule(name).set_chunk_feed_forward(1)

    @property
    def defaults(self) -> Defaults:
        return self.own_defaults


PROJECTIONS = {"queries": "to_q", "keys": "to_k", "values": "to_v"}


def attention_sites(unet: UNet2DConditionModel, kind: str) -> dict[str, DiffusersSite]:
    """A UNet's self-attention ("attn1") or cross-attention ("attn2"), by layer name."""
    names = [name.removesuffix(".processor") for name in unet.attn_processors]
    return {
        name: DiffusersSite(name, unet.get_submodule(name))
        for name in names
        if name.endswith(f".{kind}")
    }


def decoder_layers(unet: UNet2DConditionModel) -> list[tuple[str, list[str]]]:
    """All layers of the decoder, deepest first: the last convolution of a residual block, by name,
    and the self-attentions that follow the block. Stable Diffusion 1.x and 2.x have twelve.
    """
    layers = []
    for b, block in enumerate(unet.up_blocks):
        transformers = getattr(block, "attentions", [])
        for r in range(len(block.resnets)):
            depth = len(transformers[r].transformer_blocks) if r < len(transformers) else 0
            within = f"up_blocks.{b}.attentions.{r}.transformer_blocks"
            sites = [f"{within}.{d}.attn1" for d in range(depth)]
            layers.append((f"up_blocks.{b}.resnets.{r}.conv2", sites))
    return layers


def check_folder(folder: Path, components: Mapping[str, Any]) -> None:
    """Raises `ModelError` unless all components are there, with safetensors and vocabulary."""
    for name, kind in components.items():
        part = folder / name
        if not part.is_dir():
            raise ModelError(
                f"the model folder {folder} has no {name}/; expected diffusers' layout with "
                f"{', '.join(components)}"
            )
        if issubclass(kind, nn.Module):
            require_safetensors(part)
        if name.startswith("tokenizer"):
            files = {file.name for file in part.iterdir()}
            if not any(files.issuperset(needed) for needed in VOCABULARIES):
                raise ModelError(
                    f"{part} has no vocabulary; expected tokenizer.json, or vocab.json and "
                    f"merges.txt"
                )


def load_component(model: str, name: str, kind: Any, dtype: torch.dtype) -> Any:
    """One component by its own class, with errors that say what to do."""
    if not issubclass(kind, nn.Module):
        load = read_scheduler if name == "scheduler" else kind.from_pretrained
        return load_pretrained(load, model, name, INDEX, subfolder=name)
    options: dict[str, Any] = {"torch_dtype": dtype}  # diffusers'
    if issubclass(kind, PreTrainedModel):
        # said here, or else a model's configuration may name an attention kernel's code on a hub
        options = {"dtype": dtype, "attn_implementation": "sdpa"}  # transformers'
    return load_network(kind, model, name, INDEX, subfolder=name, **options)
