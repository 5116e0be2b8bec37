"""A VAE in place of a model's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from tokenflow.diffusion.loading import (
    ModelError,
    folder_or_id,
    load_network,
    require_safetensors,
)
from tokenflow.diffusion.single_file import VAE, Checkpoint, configured, converted

CONFIG = "config.json"


def load_vae(model: str, like: AutoencoderKL, dtype: torch.dtype) -> AutoencoderKL:
    """Loads a VAE that makes the latents that another one makes.

    Args:
        model: Its folder in diffusers' layout, or that of a whole model, the id of a hub model with
            a VAE alone, or a *.safetensors file in Stable Diffusion's own layout, whose scale is
            taken to be that of the other one.
        like: The VAE that it replaces.
        dtype: Of its weights.

    Raises:
        ModelError: It is missing, has no safetensors, cannot be fetched, or is one for another
            model.
    """
    found = folder_or_id(model, CONFIG, file=True)
    path, options = Path(found), dict[str, Any]()
    if (path / "vae").is_dir():
        path, options = path / "vae", {"subfolder": "vae"}
    if path.is_file():
        vae = vae_of_file(path, like, dtype)
    else:
        if path.is_dir():
            require_safetensors(path)
        vae = load_network(AutoencoderKL, found, "the VAE", CONFIG, torch_dtype=dtype, **options)
    check_fit(vae, like, model)
    return vae


def vae_of_file(file: Path, like: AutoencoderKL, dtype: torch.dtype) -> AutoencoderKL:
    """A VAE in one file: alone, or in a whole checkpoint."""
    checkpoint = Checkpoint.read(file)
    prefix = VAE if VAE in checkpoint else ""
    if f"{prefix}encoder.down.0." not in checkpoint:
        raise ModelError(
            f"the weights of {file} are of another layout: expected a VAE of Stable Diffusion's "
            f"own, {VAE}encoder.down.* or encoder.down.*, found {checkpoint.beginning}; give the "
            f"VAE's folder in diffusers' layout"
        )
    kept = {name: like.config[name] for name in ("scaling_factor", "shift_factor", "force_upcast")}
    with configured("", {"vae": AutoencoderKL}, {"vae": checkpoint.vae(prefix) | kept}) as folder:
        vae: AutoencoderKL = converted(
            AutoencoderKL, file, "the VAE", config=folder, subfolder="vae"
        )
    return vae.to(dtype)


def check_fit(vae: AutoencoderKL, like: AutoencoderKL, name: str) -> None:
    """Raises `ModelError` with all that two VAEs' latents do not have in common."""
    facts = {
        "latent channels": lambda one: one.config.latent_channels,
        "scaling_factor": lambda one: one.config.scaling_factor,
        "shift_factor": lambda one: one.config.shift_factor or 0.0,
        "pixels per latent": lambda one: 2 ** (len(one.config.block_out_channels) - 1),
    }
    wrong = [
        f"{word} {of(like)} (found {of(vae)})" for word, of in facts.items() if of(like) != of(vae)
    ]
    if wrong:
        raise ModelError(
            f"the VAE {name} is not for this model: expected {', '.join(wrong)}; choose one that "
            f"was trained for it"
        )
