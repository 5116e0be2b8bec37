"""Stable Diffusion 3 and 3.5, beside diffusers' own pipeline."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Pipeline,
)

from tests.diffusion.making_transformers import changed, copied, parts, sampled, write_tiny_sd3
from tokenflow.diffusion import Backbone, ModelError, StableDiffusion3, invert
from tokenflow.diffusion.inversion import inversion_steps, source_prediction
from tokenflow.editors import SDEdit
from tokenflow.engine import Settings, edit_clip
from tokenflow.errors import InputError
from tokenflow.propagation import NNField
from tokenflow.testing import check_backbone, tiny_clip

STEPS = 4
# float32, sums in another order, through four guided steps of latents up to 12
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_sd3(tmp_path_factory.mktemp("sd3"))


@pytest.fixture(scope="module")
def sd3(folder: Path) -> StableDiffusion3:
    found = Backbone.load(folder, "cpu", "float32")
    assert type(found) is StableDiffusion3
    return found


def difference(model: StableDiffusion3, guidance: float, height: int = 8, width: int = 8) -> float:
    """Between diffusers' latents and ours, of two images from one noise."""
    pipeline = StableDiffusion3Pipeline(**parts(model))
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, model.latent_channels, height, width, generator=generator)
    scale = model.latent_scale
    expected = pipeline(
        2 * ["a blue ball on sand"], negative_prompt=2 * ["red"], height=scale * height,
        width=scale * width, num_inference_steps=STEPS, guidance_scale=guidance,
        latents=noise.clone(), output_type="latent",
    ).images  # fmt: skip
    found = sampled(model, noise, STEPS, "a blue ball on sand", "red", guidance)
    return float((found - expected).abs().max())


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_sampling_equals_diffusers_pipeline(sd3: StableDiffusion3, guidance: float) -> None:
    assert difference(sd3, guidance) < TOLERANCE


def test_another_size_than_the_models(sd3: StableDiffusion3) -> None:
    assert difference(sd3, 4.0, 6, 16) < TOLERANCE


@pytest.mark.parametrize(
    "options",
    [
        {"qk_norm": None, "dual_attention_layers": ()},  # SD 3.0
        {"pos_embed_max_size": 8},
        {"patch_size": 1},
    ],
    ids=str,
)
def test_other_transformers(tmp_path: Path, options: dict[str, Any]) -> None:
    model = Backbone.load(write_tiny_sd3(tmp_path, t5=False, **options), "cpu", "float32")
    assert isinstance(model, StableDiffusion3)
    assert model.t5 is None
    assert difference(model, 4.0) < TOLERANCE


def test_a_shift_by_the_images_size(sd3: StableDiffusion3, folder: Path) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_image_seq_len=4, max_image_seq_len=40
    )
    model = StableDiffusion3(**{**parts(sd3), "scheduler": scheduler})
    assert difference(model, 1.0, 6, 16) < TOLERANCE
    small, large = (model.schedule(STEPS, size).noise for size in ((4, 4), (16, 16)))
    assert small[0] == large[0] == 1
    assert all(a < b for a, b in zip(small[1:-1], large[1:-1], strict=True))
    assert model.schedule(STEPS) == model.schedule(STEPS, (8, 8))


def test_the_text_encoders_embeddings_are_the_pipelines(sd3: StableDiffusion3) -> None:
    pipeline = StableDiffusion3Pipeline(**parts(sd3))
    embeddings, _, pooled, _ = pipeline.encode_prompt("a ball", None, None)
    found = sd3.embed(["a ball"])
    assert torch.equal(found["embeddings"], embeddings)
    assert torch.equal(found["pooled"], pooled)


def test_the_vae_shifts_and_scales(sd3: StableDiffusion3) -> None:
    frames = tiny_clip(2).frames[:]
    codes = sd3.vae.encode(2 * frames - 1).latent_dist.mean
    latents = sd3.encode(frames)
    assert torch.allclose(latents, (codes - 0.06) * 1.5, atol=1e-6)
    decoded = (sd3.vae.decode(codes).sample / 2 + 0.5).clamp(0, 1)
    assert torch.allclose(sd3.decode(latents), decoded, atol=1e-5)


def test_another_vae(sd3: StableDiffusion3, folder: Path, tmp_path: Path) -> None:
    other = copied(folder / "vae", tmp_path / "vae")
    torch.manual_seed(7)
    AutoencoderKL.from_config(sd3.vae.config).save_pretrained(other)
    model = Backbone.load(folder, "cpu", "float32", vae=str(other))
    assert model.fingerprint != sd3.fingerprint
    frames = tiny_clip(2).frames[:]
    assert not torch.allclose(model.encode(frames), sd3.encode(frames), atol=1e-2)
    changed(other / "config.json", shift_factor=0.1)
    message = r"is not for this model: expected shift_factor 0\.06 \(found 0\.1\); choose one"
    with pytest.raises(ModelError, match=message):
        Backbone.load(folder, "cpu", "float32", vae=str(other))


def test_it_passes_the_kit(sd3: StableDiffusion3) -> None:
    check_backbone(sd3)


def test_its_frozen_parts_and_its_sizes(sd3: StableDiffusion3) -> None:
    assert (sd3.device.type, sd3.dtype) == ("cpu", torch.float32)
    assert (sd3.latent_channels, sd3.latent_scale, sd3.multiple, sd3.size) == (4, 2, 4, 8)
    assert sd3.largest == 64
    assert len(sd3.networks) == 5
    for network in sd3.networks:
        assert not network.training
        assert not any(parameter.requires_grad for parameter in network.parameters())
    assert "block_controlnet_hidden_states" in sd3.further_inputs
    assert not sd3.further_inputs & {"hidden_states", "timestep", "self", "return_dict"}


def test_its_sites_and_layers(sd3: StableDiffusion3) -> None:
    blocks = [f"transformer_blocks.{number}" for number in range(3)]
    sites = sd3.sites()
    assert [*sites] == [
        f"{blocks[0]}.attn",
        f"{blocks[0]}.attn2",
        *(f"{b}.attn" for b in blocks[1:]),
    ]
    assert [site.has_text for site in sites.values()] == [True, False, True, True]
    assert [site.matched for site in sites.values()] == [False, False, True, True]
    assert all(sites[name].layer is sd3.network.get_submodule(name) for name in sites)
    assert sd3.layers("keys") == [f"{block}.attn.to_k" for block in blocks]
    assert sd3.layers("structure") == []
    assert not any(map(sd3.entries, sd3.layers("queries")))


def test_inversion_with_more_steps_than_sampling(sd3: StableDiffusion3) -> None:
    latents, schedule = sd3.encode(tiny_clip(2).frames[:]), sd3.schedule(3)
    refined = schedule.refined(sd3.schedule(7))
    steps = [a - b for a, b in pairwise(refined.noise)]
    assert len(steps) == 7
    assert min(steps) > 0
    assert max(steps) > 2 * min(steps)  # shifted
    assert {*zip(schedule.timesteps, schedule.noise, strict=False)} <= {
        *zip(refined.timesteps, refined.noise, strict=False)
    }
    trajectory = invert(sd3, latents, "a ball", schedule, 7)
    assert trajectory.timesteps == schedule.timesteps
    assert (trajectory.noisiest_signal, trajectory.noisiest_noise) == (0, 1)
    source, predict = trajectory.source(), source_prediction(sd3, "a ball")
    assert torch.equal(source.noise, source.at(0))
    *_, (level, x) = inversion_steps(predict, latents, [0, 1], refined)
    assert level == 0
    assert torch.equal(x, source.at(0))


def test_frames_larger_than_the_table_of_positions(sd3: StableDiffusion3) -> None:
    settings = Settings(steps=1, consistency="none")
    with pytest.raises(InputError, match=r"are 16x68, expected sides of at most 64 for this"):
        edit_clip(sd3, tiny_clip(1, 16, 68), "a ball", SDEdit(), NNField(), settings)


def test_a_fingerprint_is_of_all_parts(sd3: StableDiffusion3, folder: Path, tmp_path: Path) -> None:
    assert Backbone.load(folder, "cpu", "float32").fingerprint == sd3.fingerprint
    without = StableDiffusion3(**{**parts(sd3), "text_encoder_3": None, "tokenizer_3": None})
    shifted = FlowMatchEulerDiscreteScheduler(shift=2.0)
    other = StableDiffusion3(**{**parts(sd3), "scheduler": shifted})
    assert len({sd3.fingerprint, without.fingerprint, other.fingerprint}) == 3


def test_its_defaults_may_stand_beside_the_index(folder: Path, tmp_path: Path) -> None:
    spoilt = copied(folder, tmp_path / "model")
    (spoilt / "tokenflow.json").write_text('{"guidance": 3.0, "features": 0.0}')
    assert Backbone.load(spoilt, "cpu", "float32").defaults.guidance == 3.0
    found, own = Backbone.describe(folder), Backbone.describe(spoilt)
    assert (found.defaults.guidance, own.defaults.guidance) == (7.0, 3.0)


def test_a_prompt_that_is_cut_gives_a_warning(sd3: StableDiffusion3) -> None:
    with pytest.warns(UserWarning, match=r"T5 takes at most 256 tokens, got 301; the end is cut"):
        sd3.embed(["a" * 299])  # and what begins and ends


@pytest.mark.parametrize("name", ["text_encoder_3", "tokenizer_3"])
def test_an_index_without_the_third_text_encoder(folder: Path, tmp_path: Path, name: str) -> None:
    spoilt = copied(folder, tmp_path / "model")
    changed(spoilt / "model_index.json", **{name: None})
    message = rf"names no {name}, expected one of class T5.*, or \[null, null\] for all of text_enc"
    with pytest.raises(ModelError, match=message):
        Backbone.load(spoilt, "cpu", "float32")


def test_a_folder_without_the_third_text_encoder(folder: Path, tmp_path: Path) -> None:
    spoilt = copied(folder, tmp_path / "model")
    shutil.rmtree(spoilt / "text_encoder_3")
    message = r"has no text_encoder_3/, which its model_index.json names, or \[null, null\] for all"
    with pytest.raises(ModelError, match=message):
        Backbone.load(spoilt, "cpu", "float32")


def test_an_index_with_half_of_the_third_text_encoder(folder: Path, tmp_path: Path) -> None:
    spoilt = copied(folder, tmp_path / "model")
    changed(spoilt / "model_index.json", tokenizer_3=[None, None])
    with pytest.raises(ModelError, match="names no tokenizer_3, expected all of text_enc"):
        Backbone.load(spoilt, "cpu", "float32")


def test_a_folder_without_a_component(folder: Path, tmp_path: Path) -> None:
    spoilt = copied(folder, tmp_path / "model")
    shutil.rmtree(spoilt / "vae")
    with pytest.raises(ModelError, match=r"has no vae/, which its .* names; expected diffusers'"):
        Backbone.load(spoilt, "cpu", "float32")


def test_pickled_weights_are_not_read(folder: Path, tmp_path: Path) -> None:
    spoilt = copied(folder, tmp_path / "model")
    (file,) = (spoilt / "text_encoder_3").glob("*.safetensors")
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(ModelError, match=r"text_encoder_3 has no \*\.safetensors file"):
        Backbone.load(spoilt, "cpu", "float32")


def test_a_transformer_of_another_family(folder: Path, tmp_path: Path) -> None:
    spoilt = copied(folder, tmp_path / "model")
    changed(spoilt / "transformer" / "config.json", _class_name="FluxTransformer2DModel")
    message = (
        r"is a FluxTransformer2DModel, expected a SD3Transformer2DModel, as Stable Diffusion 3"
    )
    with pytest.raises(ModelError, match=message):
        Backbone.load(spoilt, "cpu", "float32")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooled_projection_dim": 15}, "takes pooled embeddings of width 15 and .* make 14"),
        ({"joint_attention_dim": 24}, "takes embeddings of width 24 and the text encoders make 20"),
        (
            {"in_channels": 8},
            "takes 8 channels and the VAE's latents have 4; expected parts of one",
        ),
    ],
)
def test_parts_of_several_models(tmp_path: Path, options: dict[str, int], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        Backbone.load(write_tiny_sd3(tmp_path, **options), "cpu", "float32")


def test_wider_text_encoders_than_the_transformer_takes(tmp_path: Path) -> None:
    model = write_tiny_sd3(tmp_path, t5=False, joint_attention_dim=16)
    with pytest.raises(ModelError, match=r"takes embeddings of width 16 and .* make 20"):
        Backbone.load(model, "cpu", "float32")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"_class_name": "DDIMScheduler"},
            "is DDIMScheduler, expected one of diffusers' FlowMatch",
        ),
        ({"invert_sigmas": True}, "Discrete.* with invert_sigmas, expected one of diffusers'"),
    ],
)
def test_a_scheduler_of_another_kind(
    folder: Path, tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    spoilt = copied(folder, tmp_path / "model")
    changed(spoilt / "scheduler" / "scheduler_config.json", **values)
    with pytest.raises(ModelError, match=message):
        Backbone.load(spoilt, "cpu", "float32")


def test_a_vae_without_a_scale(folder: Path, tmp_path: Path) -> None:
    spoilt = copied(folder, tmp_path / "model")
    changed(spoilt / "vae" / "config.json", scaling_factor=0)
    with pytest.raises(ModelError, match=r"scaling_factor is 0 and its shift_factor 0\.06, exp"):
        Backbone.load(spoilt, "cpu", "float32")


def test_it_is_not_compiled(folder: Path) -> None:
    with pytest.raises(ModelError, match="a StableDiffusion3 cannot be compiled"):
        Backbone.load(folder, "cpu", "float32", compile=True)


def test_more_steps_than_it_was_trained_for(sd3: StableDiffusion3) -> None:
    with pytest.raises(InputError, match="expected 1 to 1000 steps, got 1001"):
        sd3.schedule(1001)
