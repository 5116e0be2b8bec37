"""What the families with a UNet have in common: Stable Diffusion 1.x and 2.x, SDXL."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.resnet import ResnetBlock2D
from jaxtyping import Float
from torch import Tensor

from tokenflow.diffusion.backbone import Defaults, FurtherChannels, Role
from tokenflow.diffusion.clip import CLIPText
from tokenflow.diffusion.conditioning import Conditioning
from tokenflow.diffusion.latent_diffusion import PROJECTIONS, LatentDiffusion
from tokenflow.diffusion.loading import ModelError, whole
from tokenflow.diffusion.schedule import Schedule, Timestep
from tokenflow.diffusion.scheduler import check_noise, read_scheduler, respaced
from tokenflow.diffusion.single_file import Checkpoint, load_parts
from tokenflow.diffusion.sites import DiffusersSite
from tokenflow.diffusion.textual_inversion import Embedding, add

# what makes a UNet ask for further inputs
FURTHER = (
    "addition_embed_type",
    "class_embed_type",
    "num_class_embeds",
    "encoder_hid_dim",
    "encoder_hid_dim_type",
)
EMBEDDED_GUIDANCE = 8.5
"""The default scale of guidance of a UNet that embeds it, as in diffusers' pipeline."""
VOCABULARIES = ({"tokenizer.json"}, {"vocab.json", "merges.txt"})


class UNetBackbone(LatentDiffusion):
    """A UNet that predicts noise or v, a VAE, CLIP text encoders, and a noise schedule by betas.

    Args:
        unet: The denoising network.
        vae: Between frames and latents.
        texts: The text encoders, in the order in which their embeddings stand beside each other.
        scheduler: Of the noise that the UNet was trained on.

    Raises:
        ModelError: The parts do not fit each other, or this family.
    """

    taken: ClassVar[Mapping[str, Any]] = {}
    """Of a UNet's configuration, further inputs that this family gives it."""

    given = frozenset({
        "sample", "timestep", "encoder_hidden_states", "added_cond_kwargs", "timestep_cond",
    })  # fmt: skip
    lora_loader = StableDiffusionLoraLoaderMixin
    family_defaults = Defaults()
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
        super().__init__(unet, vae, texts, scheduler)
        self.unet, self.clips = unet, tuple(texts)

    @classmethod
    def check_unet(cls, unet: UNet2DConditionModel, vae: AutoencoderKL, width: int) -> None:
        """Raises `ModelError` unless a UNet takes what this family gives it.

        Args:
            unet: The network.
            vae: Whose latents it takes.
            width: Of the text encoders' embeddings beside each other.
        """
        latents = vae.config.latent_channels
        if unet.config.in_channels not in (latents, latents + 1, 2 * latents + 1):
            raise ModelError(
                f"the UNet takes {unet.config.in_channels} channels and the VAE's latents have "
                f"{latents}; expected {latents}, {latents + 1} (with depth) or {2 * latents + 1} "
                f"(for inpainting): models for upscaling or with image prompts do not fit"
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

    def add_embeddings(self, embeddings: Sequence[Embedding]) -> None:
        add(embeddings, self.clips, self.title)
        self.forget_fingerprint()

    def respace(self, timesteps: str) -> None:
        self.scheduler = respaced(self.scheduler, timesteps)
        self.forget_fingerprint()

    @classmethod
    def load_parts(cls, model: str, dtype: torch.dtype) -> dict[str, Any]:
        if Path(model).is_file():
            return load_parts(model, cls.components, dtype)
        if Path(model).is_dir():
            check_folder(Path(model), cls.components)
        return {
            name: cls.load_part(model, name, kind, dtype) for name, kind in cls.components.items()
        }

    @classmethod
    def read_scheduler(cls, model: str, **options: Any) -> DDIMScheduler:
        return read_scheduler(model, **options)

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
    def multiple(self) -> int:
        """What frames' height and width must be multiples of: the UNet's deepest latent."""
        return int(self.latent_scale * 2 ** (len(self.unet.config.block_out_channels) - 1))

    @property
    def size(self) -> int:
        return int(self.unet.config.sample_size)

    @property
    def latent_channels(self) -> int:
        return int(self.vae.config.latent_channels)

    @property
    def further_channels(self) -> FurtherChannels | None:
        return self.channels_of(self.unet.config)

    @classmethod
    def channels_of(cls, config: Mapping[str, Any]) -> FurtherChannels | None:
        more = config["in_channels"] - config["out_channels"]
        if more == 0:
            return None
        return "depth" if more == 1 else "mask"

    @classmethod
    def defaults_of(cls, config: Mapping[str, Any]) -> Defaults:
        if config["time_cond_proj_dim"] is None:
            return cls.family_defaults
        return replace(cls.family_defaults, guidance=EMBEDDED_GUIDANCE)

    @classmethod
    def read_config(cls, model: str) -> Mapping[str, Any]:
        if Path(model).is_file():
            return whole(cls.components["unet"], Checkpoint.read(Path(model)).unet())
        return super().read_config(model)

    def schedule(self, steps: int, size: tuple[int, int] | None = None) -> Schedule:
        return Schedule.from_ddim(self.scheduler, steps)

    def predict(
        self,
        latents: Float[Tensor, "n c h w"],
        t: Timestep,
        conditioning: Conditioning,
        *,
        channels: Float[Tensor, "n d h w"] | None = None,
        **inputs: Any,
    ) -> Float[Tensor, "n c h w"]:
        if channels is None and self.further_channels is not None:
            raise ModelError(
                f"the network takes the frames' {self.further_channels} beside their latents, got "
                f"no channels; edit a clip by edit_clip or predict, or choose another model"
            )
        sample = latents.to(self.device)
        if channels is not None:
            sample = torch.cat([sample, channels.to(sample)], dim=1)
        output = self.unet(
            sample.to(self.dtype),
            torch.full((1,), t, device=self.device),  # a number would be copied, and waited for
            **self.arguments(conditioning, latents),
            **inputs,
        )
        return output.sample.float()

    def arguments(
        self, conditioning: Conditioning, latents: Float[Tensor, "n c h w"]
    ) -> dict[str, Any]:
        """The UNet's arguments besides latents and time, and a ControlNet's of the same family."""
        given: dict[str, Any] = {"encoder_hidden_states": conditioning["embeddings"]}
        if "guidance" in conditioning:
            excess = 1000 * (conditioning["guidance"] - 1)
            width = self.unet.config.time_cond_proj_dim
            embedding = get_timestep_embedding(excess, width, downscale_freq_shift=1)
            given["timestep_cond"] = embedding.to(self.dtype)
        return given

    def conditioning(self, **tensors: Tensor) -> Conditioning:
        """The text encoders' output, and a "guidance" of 1 for a UNet that embeds its scale.

        Source: Meng et al. 2023 (arXiv 2210.03142), section 3.1.
        """
        if self.unet.config.time_cond_proj_dim is not None:
            tensors["guidance"] = torch.ones(len(tensors["embeddings"]), device=self.device)
        return Conditioning(**tensors)

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
    """Raises `ModelError` unless all components are there, tokenizers with a vocabulary."""
    for name in components:
        part = folder / name
        if not part.is_dir():
            raise ModelError(
                f"the model folder {folder} has no {name}/; expected diffusers' layout with "
                f"{', '.join(components)}"
            )
        if name.startswith("tokenizer"):
            files = {file.name for file in part.iterdir()}
            if not any(files.issuperset(needed) for needed in VOCABULARIES):
                raise ModelError(
                    f"{part} has no vocabulary; expected tokenizer.json, or vocab.json and "
                    f"merges.txt"
                )
