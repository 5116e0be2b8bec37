"""SDXL, beside diffusers' own pipeline."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    UNet2DConditionModel,
)
from torch import Tensor

from tests.diffusion.making import pipeline_of, sampled, write_tiny_xl
from tests.on_ranks import on_ranks
from tokenflow.diffusion import Backbone, Conditioning, ModelError, StableDiffusionXL
from tokenflow.diffusion.backbone import VARIANT_PARTS
from tokenflow.diffusion.scheduler import Timesteps
from tokenflow.editors import PnP, Prompts
from tokenflow.engine import Settings, edit_clip
from tokenflow.engine.ranks.group import FrameGroup
from tokenflow.propagation import NNField
from tokenflow.testing import check_backbone, tiny_clip

STEPS = 4
PARTS = (*StableDiffusionXL.components,)
# float32, sums in another order, through four guided steps of latents up to 6
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_xl(tmp_path_factory.mktemp("xl"))


@pytest.fixture(scope="module")
def xl(folder: Path) -> StableDiffusionXL:
    found = Backbone.load(folder, "cpu", "float32")
    assert type(found) is StableDiffusionXL
    return found


def with_parts(model: StableDiffusionXL, **parts: Any) -> StableDiffusionXL:
    return StableDiffusionXL(**{name: parts.get(name, getattr(model, name)) for name in PARTS})


def noise(count: int = 2, height: int = 8, width: int = 12) -> Tensor:
    return torch.randn(count, 4, height, width, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("negative", ["a green cube", ""])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("prompt", ["a red ball on sand", "a blue box"])
def test_sampling_is_diffusers_pipeline(
    xl: StableDiffusionXL, prompt: str, guidance: float, negative: str
) -> None:
    x = noise()
    expected = pipeline_of(xl)(
        [prompt] * 2, height=16, width=24, num_inference_steps=STEPS, guidance_scale=guidance,
        negative_prompt=[negative] * 2 if negative else None, latents=x, output_type="latent",
    ).images  # fmt: skip
    found = sampled(xl, x, STEPS, prompt, negative, guidance)
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
    assert (found - x).abs().max() > 0.1


def test_an_empty_prompt_is_encoded_where_the_index_says_so(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "model"))
    zeros = Backbone.load(copy, "cpu", "float32")
    assert not any(tensor.any() for tensor in zeros.embed([""]).tensors.values())
    index = json.loads((copy / "model_index.json").read_text())
    index["force_zeros_for_empty_prompt"] = False
    (copy / "model_index.json").write_text(json.dumps(index))
    encoded = Backbone.load(copy, "cpu", "float32")
    assert all(tensor.any() for tensor in encoded.embed([""]).tensors.values())
    assert encoded.fingerprint != zeros.fingerprint


def test_both_encoders_are_told_the_prompt(xl: StableDiffusionXL) -> None:
    found = xl.embed(["a ball", "a box"])
    embeddings, _, pooled, _ = pipeline_of(xl).encode_prompt(["a ball", "a box"], device="cpu")
    assert found.same_as(Conditioning(embeddings=embeddings, pooled=pooled))


def test_the_network_is_told_the_frames_size(xl: StableDiffusionXL) -> None:
    given = xl.arguments(xl.embed(["a ball"]), torch.empty(1, 4, 8, 12))
    assert given["added_cond_kwargs"]["time_ids"].tolist() == [[16, 24, 0, 0, 16, 24]]
    assert "added_cond_kwargs" not in xl.further_inputs


def test_the_contract_holds(xl: StableDiffusionXL) -> None:
    check_backbone(xl)


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize(("spacing", "own"), [("trailing", 1), ("leading", 1), ("trailing", 0)])
def test_few_steps_by_eulers_scheduler(
    folder: Path, tmp_path: Path, spacing: Timesteps, own: bool
) -> None:
    """As Lightning's and Turbo's: Euler's steps are DDIM's in another scale.

    With a scheduler of the model's `own`, or with its spacing given beside a model without it.
    """
    euler = EulerDiscreteScheduler(timestep_spacing=spacing, steps_offset=1, **BETAS)
    copy = Path(shutil.copytree(folder, tmp_path / "model"))
    (euler if own else DDIMScheduler(steps_offset=1, **BETAS)).save_pretrained(copy / "scheduler")
    model = Backbone.load(copy, "cpu", "float32", timesteps=None if own else spacing)
    assert isinstance(model, StableDiffusionXL)
    euler.set_timesteps(STEPS)
    x, schedule = noise(), model.schedule(STEPS)
    expected = pipeline_of(model, scheduler=euler)(
        ["a red ball"] * 2, height=16, width=24, num_inference_steps=STEPS, guidance_scale=1.0,
        latents=x / schedule.signal[0] / euler.init_noise_sigma, output_type="latent",
    ).images  # fmt: skip
    found = sampled(model, x, STEPS, "a red ball")
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def test_the_vae_computes_in_float32_where_float16_overflows(folder: Path) -> None:
    model = Backbone.load(folder, "cpu", "float16")
    assert isinstance(model, StableDiffusionXL)
    assert model.dtype == torch.float16
    assert model.vae.dtype == torch.float32
    assert model.encode(torch.rand(1, 3, 16, 16)).dtype == torch.float32
    assert Backbone.load(folder, "cpu", "bfloat16").vae.dtype == torch.bfloat16


def test_layers_begin_at_a_quarter_of_the_latents_size(xl: StableDiffusionXL) -> None:
    structure = xl.layers("structure")
    assert structure[0] == "up_blocks.0.resnets.1.conv2"
    assert len(structure) == 8
    queries = xl.layers("queries")
    assert queries[0] == "up_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q"
    assert len(queries) == 2 * 2 + 3
    assert len(xl.sites()) == len(xl.cross_attention()) == 2 + 2 * 2 + 2 + 3 * 2 + 3
    seen: list[tuple[int, ...]] = []
    layer = xl.unet.get_submodule(structure[0])
    with layer.register_forward_hook(lambda *given: seen.append(given[2].shape)):
        xl.predict(noise(), 500, xl.embed(["", ""]))
    assert seen == [(2, 16, 2, 3)]
    for layer_name in (structure[0], queries[0]):
        for entry in xl.entries(layer_name):
            xl.unet.get_submodule(entry)


@pytest.mark.parametrize("pipeline_name", ["StableDiffusionXLImg2ImgPipeline", "Somebodys", None])
def test_a_variant_with_two_text_encoders_is_sdxl(
    folder: Path, tmp_path: Path, pipeline_name: str | None
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "model"))
    (copy / "model_index.json").unlink()
    if pipeline_name is not None:
        index = {name: ["library", VARIANT_PARTS.get(name, "Some")] for name in PARTS}
        text = json.dumps({"_class_name": pipeline_name, **index})
        (copy / "model_index.json").write_text(text)
    assert type(Backbone.load(copy, "cpu", "float32")) is StableDiffusionXL


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"addition_embed_type": None}, r"other inputs than those of SDXL \(no further\), .*SDXL"),
        ({"projection_class_embeddings_input_dim": 52}, r"takes 52 further channels, and 12 of"),
        ({"cross_attention_dim": 16}, r"width 16 and the text encoder makes 40; .* one SDXL"),
        ({"in_channels": 7}, r"takes 7 channels .* latents have 4"),
    ],
)
def test_parts_of_other_models(xl: StableDiffusionXL, changes: Any, message: str) -> None:
    unet = UNet2DConditionModel.from_config({**xl.unet.config, **changes})
    with pytest.raises(ModelError, match=message):
        with_parts(xl, unet=unet)


def edit(model: StableDiffusionXL, ranks: FrameGroup | None = None, **settings: Any) -> Tensor:
    settings = {"steps": 2, "keyframe_every": 3, "batch": 4, **settings}
    prompts = Prompts("a blue ball", inversion_prompt="a red ball")
    return edit_clip(
        model, tiny_clip(7), prompts, PnP(), NNField(), Settings(**settings), ranks=ranks
    ).latents


@pytest.mark.parametrize("consistency", ["tokenflow", "joint"])
def test_an_edit_leaves_the_network_as_it_was(xl: StableDiffusionXL, consistency: str) -> None:
    x, told = noise(), xl.embed(["a ball", "a box"])
    before = xl.predict(x, 500, told)
    latents = edit(xl, consistency=consistency)
    assert latents.isfinite().all()
    assert torch.equal(xl.predict(x, 500, told), before)
    assert not any(module._forward_hooks for module in xl.unet.modules())


def edit_in_double(folder: str, ranks: bool = True) -> Tensor:
    model = Backbone.load(folder, "cpu", "float32")
    assert isinstance(model, StableDiffusionXL)
    for network in model.networks:  # in double precision no token's neighbour is a matter of sums
        network.double()
    return edit(model, FrameGroup.join() if ranks else None)


def test_two_ranks_edit_as_one_does(folder: Path, tmp_path: Path) -> None:
    two = on_ranks(2, tmp_path, edit_in_double, str(folder))
    one = edit_in_double(str(folder), ranks=False)
    torch.testing.assert_close(torch.cat(two), one, atol=TOLERANCE, rtol=0)


def test_schedules_are_read_for_ddim(xl: StableDiffusionXL) -> None:
    assert isinstance(xl.scheduler, DDIMScheduler)
    assert xl.defaults.guidance == 5.0
