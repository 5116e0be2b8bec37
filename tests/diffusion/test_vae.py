"""A VAE in place of a model's own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file

from tests.diffusion.making import pipeline_of, sampled
from tests.diffusion.making_transformers import write_tiny_sd3
from tests.diffusion.original_layout import original_vae, prefixed
from tests.gaussian_flow import GaussianFlow
from tokenflow.diffusion import Backbone, ModelError, StableDiffusion


def make_vae(**changes: Any) -> AutoencoderKL:
    torch.manual_seed(5)
    options = {"scaling_factor": 1.0, "block_out_channels": (32, 64), **changes}
    blocks = len(options["block_out_channels"])
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks, **options,
    ).eval()  # fmt: skip


def saved(folder: Path, form: str, **changes: Any) -> str:
    """A VAE as a folder, in a whole model's folder, or in a file of its own or of a model."""
    vae = make_vae(**changes)
    if form in ("folder", "whole model"):
        vae.save_pretrained(folder / "vae")
        return str(folder if form == "whole model" else folder / "vae")
    weights = prefixed(
        "" if form == "file" else "first_stage_model.", original_vae(vae.state_dict())
    )
    save_file({name: weight.clone() for name, weight in weights.items()}, folder / "a.safetensors")
    return str(folder / "a.safetensors")


@pytest.mark.parametrize("form", ["folder", "whole model", "file", "checkpoint"])
def test_it_makes_and_shows_the_latents(
    form: str, model_folder: Path, backbone: StableDiffusion, tmp_path: Path
) -> None:
    model = Backbone.load(model_folder, "cpu", "float32", vae=saved(tmp_path, form))
    assert isinstance(model, StableDiffusion)
    pipeline = pipeline_of(backbone, vae=make_vae())
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = pipeline(
        "a ball", num_inference_steps=2, guidance_scale=1.0, latents=x, output_type="pt"
    ).images
    # float32, sums in another order
    found = model.decode(sampled(model, x, 2, "a ball"))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    with torch.no_grad():
        codes = pipeline.vae.encode(2 * expected - 1).latent_dist.mean
    torch.testing.assert_close(model.encode(expected), codes, atol=1e-4, rtol=0)
    assert model.fingerprint != backbone.fingerprint
    assert not any(p.requires_grad for p in model.vae.parameters())


@pytest.mark.parametrize("form", ["folder", "file"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent_channels": 16}, r"expected latent channels 4 \(found 16\); choose one that was"),
        ({"block_out_channels": (32, 32, 64)}, r"expected pixels per latent 2 \(found 4\)"),
    ],
)
def test_one_for_another_model(
    form: str, model_folder: Path, tmp_path: Path, changes: Any, message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        Backbone.load(model_folder, "cpu", "float32", vae=saved(tmp_path, form, **changes))


def test_one_whose_latents_have_another_scale(model_folder: Path, tmp_path: Path) -> None:
    vae = saved(tmp_path, "folder", scaling_factor=0.13025)
    with pytest.raises(ModelError, match=r"expected scaling_factor 1\.0 \(found 0\.13025\)"):
        Backbone.load(model_folder, "cpu", "float32", vae=vae)


def test_one_with_a_shift_in_a_transformers_model(tmp_path: Path) -> None:
    folder = write_tiny_sd3(tmp_path / "sd3", t5=False)
    other = copy.deepcopy(AutoencoderKL.from_pretrained(folder / "vae"))
    other.decoder.conv_out.bias.data += 0.5
    other.save_pretrained(tmp_path / "vae")
    plain = Backbone.load(folder, "cpu", "float32")
    model = Backbone.load(folder, "cpu", "float32", vae=str(tmp_path / "vae"))
    x = torch.randn(1, plain.latent_channels, 8, 8)
    with torch.no_grad():
        scaled = x / other.config.scaling_factor + other.config.shift_factor
        expected = (other.decode(scaled).sample / 2 + 0.5).clamp(0, 1)
    # float32, sums in another order
    torch.testing.assert_close(model.decode(x), expected, atol=1e-5, rtol=0)
    assert (model.decode(x) - plain.decode(x)).abs().max() > 0.1


def test_a_file_without_a_vae(model_folder: Path, tmp_path: Path) -> None:
    save_file({"lora_unet.alpha": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(
        ModelError, match=r"another layout: expected a VAE .* lora_unet\.alpha; give"
    ):
        Backbone.load(model_folder, "cpu", "float32", vae=str(tmp_path / "a.safetensors"))


def test_a_folder_without_safetensors(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no \*\.safetensors file"):
        Backbone.load(model_folder, "cpu", "float32", vae=str(tmp_path))


def test_a_family_that_takes_no_other() -> None:
    with pytest.raises(ModelError, match="a GaussianFlow takes no other VAE; leave vae out"):
        GaussianFlow().replace_vae("somewhere")
