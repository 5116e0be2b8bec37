"""The frozen model on one device: loads its parts, and calls them."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from tokenflow.diffusion.loading import (
    ModelError,
    folder_or_id,
    load_network,
    load_pretrained,
    require_safetensors,
)
from tokenflow.diffusion.sampling import Schedule
from tokenflow.diffusion.scheduler import check_noise, read_scheduler
from tokenflow.memory import told_if_short
from tokenflow.storage import digests

COMPONENTS = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "tokenizer": CLIPTokenizer,
    "scheduler": DDIMScheduler,
}
NETWORKS = ("unet", "vae", "text_encoder")
EMBEDDED = Path(__file__).parents[1] / "miniature" / "weights"
# what makes a UNet ask for further inputs
FURTHER = (
    "addition_embed_type",
    "class_embed_type",
    "num_class_embeds",
    "encoder_hid_dim",
    "encoder_hid_dim_type",
    "time_cond_proj_dim",
)
VOCABULARIES = ({"tokenizer.json"}, {"vocab.json", "merges.txt"})
INDEX = "model_index.json"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Backbone:
    """UNet, VAE, text encoder, tokenizer and scheduler configuration, on one device.

    Latents go in and come out in float32 whatever the networks' dtype, so that a sampler's sums
    do not lose bits.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        scheduler: DDIMScheduler,
    ) -> None:
        prediction = scheduler.config.prediction_type
        if prediction not in ("epsilon", "v_prediction"):
            raise ModelError(
                f"the scheduler predicts {prediction!r}, expected 'epsilon' or 'v_prediction'"
            )
        check_unet(unet, vae, text_encoder)
        scale = vae.config.scaling_factor
        if not isinstance(scale, int | float) or not 0 < scale < math.inf:
            raise ModelError(
                f"the VAE's scaling_factor is {scale!r}, expected a number above 0; mend it in "
                f"vae/config.json (Stable Diffusion 1.x and 2.x have 0.18215)"
            )
        check_noise(scheduler)
        if 2 * len(tokenizer) < (words := text_encoder.config.vocab_size):
            raise ModelError(
                f"the tokenizer knows {len(tokenizer)} tokens and the text encoder {words}: "
                f"prompts would be ignored; give the model its own, whole tokenizer"
            )
        self.unet, self.vae, self.text_encoder = unet, vae, text_encoder
        self.tokenizer, self.scheduler = tokenizer, scheduler
        for network in (unet, vae, text_encoder):
            network.requires_grad_(False).eval()

    @classmethod
    def load(cls, model: str | Path, device: str = "auto", dtype: str = "auto") -> Backbone:
        """Loads a Stable Diffusion 1.x or 2.x model, component by component.

        Args:
            model: A folder in diffusers' layout, the id of a hub model ("owner/name"), or
                "miniature", the embedded one.
            device: "auto" takes an accelerator if there is one, else the CPU.
            dtype: "float32", "float16", "bfloat16"; "auto" is float16 on an accelerator and
                float32 on the CPU.

        Raises:
            ModelError: A component is missing, has no safetensors, or cannot be fetched.
            InputError: There is not enough memory.
        """
        if dtype not in ("auto", *DTYPES):
            raise ModelError(f"dtype must be one of {('auto', *DTYPES)}, got {dtype!r}")
        if model == "miniature":
            model = EMBEDDED
        model = folder_or_id(str(model), INDEX)
        if Path(model).is_dir():
            check_folder(Path(model))
        where = device if device != "auto" else default_device()
        auto = torch.float32 if torch.device(where).type == "cpu" else torch.float16
        remedy = "take a smaller model, dtype float16 or bfloat16, or a device with more"
        with told_if_short(f"on {where} for the model {model}", remedy):
            parts: dict[str, Any] = {
                name: load_component(str(model), name, auto if dtype == "auto" else DTYPES[dtype])
                for name in COMPONENTS
            }
            for name in NETWORKS:
                parts[name] = parts[name].to(where)
        return cls(**parts)

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    @cached_property
    def fingerprint(self) -> str:
        """What tells this model from another: weights, configurations, vocabulary, device.

        All weights are read, once: Stable Diffusion 1.5 takes about 3 s in float32.
        """
        networks = [digests.of_network(part) for part in (self.unet, self.vae, self.text_encoder)]
        tokens = json.loads(self.tokenizer.backend_tokenizer.to_str())
        for state in ("padding", "truncation"):  # as the last call left them
            del tokens[state]
        schedule = {k: v for k, v in self.scheduler.config.items() if not k.startswith("_")}
        special = self.tokenizer.special_tokens_map
        return digests.of_values(networks, tokens, special, schedule, self.device.type)

    @property
    def latent_scale(self) -> int:
        """How many pixels wide one latent is."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def multiple(self) -> int:
        """What frames' height and width must be multiples of: the UNet's deepest latent."""
        return int(self.latent_scale * 2 ** (len(self.unet.config.block_out_channels) - 1))

    def schedule(self, steps: int) -> Schedule:
        """The model's noise schedule with `steps` sampling timesteps."""
        return Schedule.from_scheduler(self.scheduler, steps)

    @torch.no_grad()
    def embed(self, prompts: Sequence[str]) -> Float[Tensor, "prompts tokens width"]:
        """The text encoder's last hidden state; prompts are padded or cut to all its positions.

        A prompt that is cut gives a warning.
        """
        length = self.text_encoder.config.max_position_embeddings
        for prompt in prompts:
            self._warn_if_cut(prompt, length)
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=length,
            return_tensors="pt",
        )
        return self.text_encoder(tokens["input_ids"].to(self.device))[0]

    def _warn_if_cut(self, prompt: str, length: int) -> None:
        tokens = self.tokenizer(prompt, return_offsets_mapping=True, verbose=False)
        count = len(tokens["input_ids"])
        if count > length:
            begin, _ = tokens["offset_mapping"][length - 1]  # the last position is the end's
            warnings.warn(
                f"the text encoder takes at most {length - 2} tokens, got {count - 2}; the end is "
                f"cut off: {prompt[begin:]!r} of {prompt!r}",
                stacklevel=1,
            )

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

    def epsilon(
        self,
        latents: Float[Tensor, "n c h w"],
        t: int,
        embeddings: Float[Tensor, "n tokens width"],
        schedule: Schedule,
        **extra: Any,
    ) -> Float[Tensor, "n c h w"]:
        """The noise that the UNet sees in `latents`; `extra` goes to the UNet as it is."""
        output = self.unet(
            latents.to(self.device, self.dtype), t, encoder_hidden_states=embeddings, **extra
        ).sample
        return schedule.epsilon(output.float(), latents.float(), t)


def check_unet(unet: UNet2DConditionModel, vae: AutoencoderKL, text_encoder: CLIPTextModel) -> None:
    """Raises `ModelError` for a UNet that asks for other inputs than latents, a time and a text."""
    if unet.config.in_channels != vae.config.latent_channels:
        raise ModelError(
            f"the UNet takes {unet.config.in_channels} channels and the VAE's latents have "
            f"{vae.config.latent_channels}; models for inpainting or upscaling do not fit"
        )
    asked = [f"{name} {value!r}" for name in FURTHER if (value := unet.config.get(name))]
    if asked:
        raise ModelError(
            f"the UNet asks for more than latents and a prompt ({', '.join(asked)}), as those of "
            f"SDXL, unCLIP and consistency models do; expected a Stable Diffusion 1.x or 2.x"
        )
    blocks = (block for name, block in unet.named_modules() if name.endswith(".attn1"))
    if any(block.is_cross_attention for block in blocks):
        raise ModelError(
            "the UNet has only cross-attention, none among a frame's tokens, in which a video's "
            "frames could take part; expected a Stable Diffusion 1.x or 2.x"
        )
    taken, given = unet.config.cross_attention_dim, text_encoder.config.hidden_size
    if {given} != set(taken if isinstance(taken, list | tuple) else [taken]):
        raise ModelError(
            f"the UNet takes embeddings of width {taken} and the text encoder makes {given}; "
            f"expected parts of one Stable Diffusion 1.x or 2.x, not of several models"
        )


def default_device() -> str:
    """The accelerator's name if there is one, else "cpu"."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator.type if accelerator is not None else "cpu"


def check_folder(folder: Path) -> None:
    """Raises `ModelError` unless all components are there, with safetensors and vocabulary."""
    for name in COMPONENTS:
        part = folder / name
        if not part.is_dir():
            raise ModelError(
                f"the model folder {folder} has no {name}/; expected diffusers' layout with "
                f"{', '.join(COMPONENTS)}"
            )
        if name in NETWORKS:
            require_safetensors(part)
    files = {file.name for file in (folder / "tokenizer").iterdir()}
    if not any(files.issuperset(needed) for needed in VOCABULARIES):
        raise ModelError(
            f"{folder / 'tokenizer'} has no vocabulary; expected tokenizer.json, or vocab.json and "
            f"merges.txt"
        )


def load_component(model: str, name: str, dtype: torch.dtype) -> Any:
    """One component by its own class, with errors that say what to do."""
    kind = COMPONENTS[name]
    if name not in NETWORKS:
        load = read_scheduler if name == "scheduler" else kind.from_pretrained
        return load_pretrained(load, model, name, INDEX, subfolder=name)
    # said here, or else a model's configuration may name an attention kernel's code on a hub
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": "sdpa"}  # transformers'
    if name != "text_encoder":
        options = {"torch_dtype": dtype}  # diffusers'
    return load_network(kind, model, name, INDEX, subfolder=name, **options)
