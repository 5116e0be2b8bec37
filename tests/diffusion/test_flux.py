"""Flux dev and schnell, beside diffusers' own pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from torch import Tensor

from tests.diffusion.making_transformers import (
    changed,
    copied,
    parts,
    sampled,
    write_tiny_flux,
)
from tokenflow.diffusion import Backbone, Conditioning, Flux, ModelError
from tokenflow.diffusion.text_to_image import text_to_image
from tokenflow.testing import check_backbone

STEPS, HEIGHT, WIDTH = 4, 6, 10
# float32, sums in another order, through four steps of latents up to 10
TOLERANCE = 1e-4
PROMPT = "a blue ball on sand"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_flux(tmp_path_factory.mktemp("dev"))


@pytest.fixture(scope="module")
def dev(folder: Path) -> Flux:
    found = Backbone.load(folder, "cpu", "float32")
    assert type(found) is Flux
    return found


@pytest.fixture(scope="module")
def schnell(tmp_path_factory: pytest.TempPathFactory) -> Flux:
    found = Backbone.load(
        write_tiny_flux(tmp_path_factory.mktemp("schnell"), False), "cpu", "float32"
    )
    assert isinstance(found, Flux)
    return found


def test_its_files_say_what_it_is(folder: Path, dev: Flux) -> None:
    assert dev.defaults.guidance == 3.5
    found = Backbone.describe(folder)
    assert (found.family, found.defaults, found.few_steps) == (Flux, dev.defaults, False)


def noise() -> Tensor:
    return torch.randn(2, 4, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))


def by_pipeline(model: Flux, **options: Any) -> Tensor:
    """Diffusers' latents of two images, unpacked."""
    pipeline = FluxPipeline(**parts(model))
    pipeline.set_progress_bar_config(disable=True)
    height, width = (model.latent_scale * side for side in (HEIGHT, WIDTH))
    found = pipeline(
        2 * [PROMPT], height=height, width=width, num_inference_steps=STEPS, output_type="latent",
        latents=FluxPipeline._pack_latents(noise(), 2, 4, HEIGHT, WIDTH), **options,
    ).images  # fmt: skip
    return FluxPipeline._unpack_latents(found, height, width, model.latent_scale)


@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_dev_equals_diffusers_pipeline(dev: Flux, guidance: float) -> None:
    expected = by_pipeline(dev, guidance_scale=guidance)
    found = sampled(dev, noise(), STEPS, PROMPT, "red", guidance)
    assert float((found - expected).abs().max()) < TOLERANCE


def test_schnell_equals_diffusers_pipeline(schnell: Flux) -> None:
    assert "guidance" not in schnell.embed([""])
    assert schnell.defaults.guidance == 1
    expected = by_pipeline(schnell, guidance_scale=0.0)
    found = sampled(schnell, noise(), STEPS, PROMPT)
    assert float((found - expected).abs().max()) < TOLERANCE


def test_schnell_may_be_guided_by_a_negative_prompt(schnell: Flux) -> None:
    options = {"negative_prompt": 2 * ["red"], "true_cfg_scale": 3.0}
    found = sampled(schnell, noise(), STEPS, PROMPT, "red", 3.0)
    assert float((found - by_pipeline(schnell, **options)).abs().max()) < TOLERANCE


def test_the_guidance_that_dev_is_told_has_an_effect(dev: Flux) -> None:
    assert torch.equal(dev.embed(["", "a"])["guidance"], torch.ones(2))
    low, high = (sampled(dev, noise(), STEPS, PROMPT, "", scale) for scale in (1.0, 3.5))
    assert float((low - high).abs().max()) > 100 * TOLERANCE
    # its negative prompt has none
    assert torch.equal(high, sampled(dev, noise(), STEPS, PROMPT, "red", 3.5))


def test_text_to_image_tells_the_guidance(dev: Flux, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenflow.diffusion.flux.SIZE", 8)
    told: list[Tensor] = []
    predict = dev.predict

    def watched(latents: Tensor, t: float, conditioning: Conditioning, **inputs: Any) -> Tensor:
        told.append(conditioning["guidance"])
        return predict(latents, t, conditioning, **inputs)

    monkeypatch.setattr(dev, "predict", watched)
    assert text_to_image(dev, [PROMPT], 2, 2.5, 0).shape == (1, 3, 16, 16)
    assert len(told) == 2
    assert all(torch.equal(rows, torch.full((2,), 2.5)) for rows in told)


def test_the_noise_depends_on_the_frames_size(dev: Flux, schnell: Flux) -> None:
    small, large = (dev.schedule(STEPS, size).noise for size in ((4, 4), (16, 16)))
    assert small[0] == large[0] == 1
    assert all(a < b for a, b in zip(small[1:-1], large[1:-1], strict=True))
    assert schnell.schedule(STEPS, (4, 4)) == schnell.schedule(STEPS, (16, 16))
    assert dev.schedule(STEPS) == dev.schedule(STEPS, (128, 128))


def test_it_passes_the_kit(dev: Flux) -> None:
    check_backbone(dev)


def test_its_sizes_sites_and_layers(dev: Flux) -> None:
    assert (dev.latent_channels, dev.latent_scale, dev.multiple, dev.size) == (4, 2, 4, 128)
    assert dev.largest is None
    names = [f"{kind}transformer_blocks.{n}.attn" for kind in ("", "single_") for n in (0, 1)]
    sites = dev.sites()
    assert [*sites] == names
    assert all(site.has_text for site in sites.values())
    assert all(sites[name].layer is dev.network.get_submodule(name) for name in sites)
    assert dev.layers("values") == [f"{name}.to_v" for name in names[:2]]
    assert dev.layers("structure") == []
    assert "controlnet_block_samples" in dev.further_inputs
    assert not dev.further_inputs & {"hidden_states", "guidance", "img_ids"}


def test_texts_of_another_length(dev: Flux) -> None:
    """An editor may put other embeddings in place of the prompts'."""
    given = dev.embed([PROMPT])
    short = Conditioning(**{**given.tensors, "embeddings": given["embeddings"][:, :7]})
    dev.predict(noise()[:1], 500.0, short)
    single = dev.sites()["single_transformer_blocks.0.attn"]
    assert single.image(torch.zeros(1, 22, 16)).shape == (1, 15, 16)
    dev.predict(noise()[:1], 500.0, given)
    assert single.image(torch.zeros(1, 527, 16)).shape == (1, 15, 16)


def test_a_transformer_of_another_family(folder: Path, tmp_path: Path) -> None:
    spoilt = copied(folder, tmp_path / "model")
    changed(spoilt / "transformer" / "config.json", _class_name="SD3Transformer2DModel")
    message = "is a SD3Transformer2DModel, expected a FluxTransformer2DModel, as Flux has"
    with pytest.raises(ModelError, match=message):
        Backbone.load(spoilt, "cpu", "float32")


def test_text_encoders_of_another_model(folder: Path, dev: Flux, schnell: Flux) -> None:
    given = parts(dev)
    wide = type(dev.t5.encoder)(type(dev.t5.encoder.config)(**{
        **dev.t5.encoder.config.to_dict(), "d_model": 24,
    }))  # fmt: skip
    with pytest.raises(ModelError, match=r"takes embeddings of width 20 and the text .* make 24"):
        Flux(**{**given, "text_encoder_2": wide})
    unknown = type(dev.t5.encoder)(type(dev.t5.encoder.config)(**{
        **dev.t5.encoder.config.to_dict(), "vocab_size": 100,
    }))  # fmt: skip
    with pytest.raises(ModelError, match="T5 knows 30 tokens and the text encoder 100: prompts"):
        Flux(**{**given, "text_encoder_2": unknown})


def test_a_transformer_with_further_channels(dev: Flux) -> None:
    """As those that fill in, or take control images."""
    wide = type(dev.transformer).from_config({**dev.transformer.config, "in_channels": 32})
    with pytest.raises(ModelError, match="takes 8 channels and the VAE's latents have 4; expected"):
        Flux(**{**parts(dev), "transformer": wide})
