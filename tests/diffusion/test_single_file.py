"""A checkpoint in one file, equal to the folder that it was made from."""

from __future__ import annotations

import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from tests.diffusion.original_layout import (
    original_clip,
    original_open_clip,
    original_unet,
    original_vae,
    prefixed,
)
from tokenflow.diffusion import Backbone, ModelError, StableDiffusion, StableDiffusionXL
from tokenflow.diffusion.single_file import BETAS, predicted
from tokenflow.diffusion.unet import UNetBackbone
from tokenflow.miniature.tokenizer import MAX_LENGTH, save_tokenizer

FAMILIES = ("1.x", "2.x", "xl")


def make_unet(family: str) -> UNet2DConditionModel:
    """With the groups and heads of published models, which shapes do not tell."""
    attending = ["CrossAttnDownBlock2D"] * 3
    options: dict[str, Any] = {
        "1.x": {
            "block_out_channels": (32, 32, 64, 64), "cross_attention_dim": 64,
            "attention_head_dim": 8,
        },
        "2.x": {
            "block_out_channels": (64, 64, 64, 128), "cross_attention_dim": 64,
            "attention_head_dim": (1, 1, 1, 2), "use_linear_projection": True,
        },
        "xl": {
            "block_out_channels": (64, 64, 128), "cross_attention_dim": 64 + 128,
            "attention_head_dim": (1, 1, 2), "use_linear_projection": True,
            "transformer_layers_per_block": (1, 1, 2), "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + 128,
        },
    }[family]  # fmt: skip
    down = ["DownBlock2D", *attending[1:]] if family == "xl" else [*attending, "DownBlock2D"]
    up = [kind.replace("Down", "Up") for kind in reversed(down)]
    return UNet2DConditionModel(
        sample_size=128 if family == "xl" else 64, down_block_types=down, up_block_types=up,
        layers_per_block=1, **options,
    )  # fmt: skip


def clip_config(width: int, words: int, activation: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=words, hidden_size=width, intermediate_size=width, num_hidden_layers=2,
        num_attention_heads=width // 64, max_position_embeddings=MAX_LENGTH,
        hidden_act=activation, bos_token_id=words - 2, eos_token_id=words - 1, projection_dim=width,
    )  # fmt: skip


def make(family: str, folder: Path) -> tuple[Path, Path]:
    """A folder in diffusers' layout, and the file with the same weights."""
    torch.manual_seed(0)
    whole, file = folder / "model", folder / "model.safetensors"
    words = len(save_tokenizer(whole / "tokenizer"))
    unet = make_unet(family)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 64), scaling_factor=0.13025 if family == "xl" else 0.18215,
    )  # fmt: skip
    weights = prefixed("model.diffusion_model.", original_unet(unet.state_dict(), 1))
    weights |= prefixed("first_stage_model.", original_vae(vae.state_dict()))
    if family == "2.x":
        text = CLIPTextModel(clip_config(64, words, "gelu"))
        found = original_open_clip(text.state_dict())
        unused = {n.replace("resblocks.1", "resblocks.2"): w for n, w in found.items()}
        weights |= prefixed("cond_stage_model.model.", {**unused, **found})
    else:
        text = CLIPTextModel(clip_config(64, words, "quick_gelu"))
        where = "conditioner.embedders.0." if family == "xl" else "cond_stage_model."
        weights |= prefixed(f"{where}transformer.", original_clip(text.state_dict()))
    if family == "xl":
        second = CLIPTextModelWithProjection(clip_config(128, words, "gelu"))
        found = original_open_clip(second.state_dict())
        weights |= prefixed("conditioner.embedders.1.model.", found)
        second.save_pretrained(whole / "text_encoder_2")
        shutil.copytree(whole / "tokenizer", whole / "tokenizer_2")
    shutil.copytree(whole / "tokenizer", folder / "tokenizer")
    for name, part in (("unet", unet), ("vae", vae), ("text_encoder", text)):
        part.save_pretrained(whole / name)
    prediction = "v_prediction" if family == "2.x" else "epsilon"
    DDIMScheduler(**BETAS, prediction_type=prediction).save_pretrained(whole / "scheduler")
    save_file({name: weight.clone() for name, weight in weights.items()}, file)
    return whole, file


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    return {name: make(name, tmp_path_factory.mktemp(name)) for name in FAMILIES}


def load(model: str | Path) -> UNetBackbone:
    found = Backbone.load(model, "cpu", "float32")
    assert isinstance(found, UNetBackbone)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_is_the_folder_that_it_was_made_from(
    made: dict[str, tuple[Path, Path]], family: str
) -> None:
    title = "SDXL" if family == "xl" else f"Stable Diffusion {family}"
    by = "v" if family == "2.x" else "noise"
    folder, file = made[family]
    expected = load(folder)
    with pytest.warns(UserWarning, match=rf"{file} is taken for {title}, predicting {by}, with"):
        found = load(file)
    assert type(found) is (StableDiffusionXL if family == "xl" else StableDiffusion)
    x, frames = torch.randn(2, 4, 8, 8), torch.rand(1, 3, 16, 16)
    texts = [model.embed(["a red ball on sand", ""]) for model in (found, expected)]
    assert texts[0].same_as(texts[1])
    for one, other in zip(found.networks, expected.networks, strict=True):
        weights = one.state_dict()
        assert weights.keys() == other.state_dict().keys()
        assert all(torch.equal(w, other.state_dict()[name]) for name, w in weights.items())
    # weights at other places in memory may be summed in another order
    close = {"atol": 1e-5, "rtol": 0}
    torch.testing.assert_close(
        found.predict(x, 501, texts[0]), expected.predict(x, 501, texts[1]), **close
    )
    torch.testing.assert_close(found.encode(frames), expected.encode(frames), **close)
    torch.testing.assert_close(found.decode(x), expected.decode(x), **close)
    assert found.schedule(7) == expected.schedule(7)
    assert found.size == expected.size
    assert found.layers("queries") == expected.layers("queries")


def changed(
    file: Path, folder: Path, metadata: dict[str, str] | None = None, **more: Tensor
) -> Path:
    """A copy with other metadata or further weights, and a tokenizer beside it."""
    shutil.copytree(file.parent / "tokenizer", folder / "tokenizer")
    save_file(load_file(file) | more, folder / file.name, metadata=metadata)
    return folder / file.name


@pytest.mark.filterwarnings("ignore:a file of weights")
def test_what_a_file_says_of_its_prediction(
    made: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    v = changed(made["1.x"][1], tmp_path / "v", v_pred=torch.zeros(1))
    assert load(v).schedule(3).prediction == "v_prediction"
    more = {"v_pred": torch.zeros(1), "ztsnr": torch.zeros(1)}
    with pytest.raises(ModelError, match=r"trained with zero terminal SNR: .* choose another"):
        load(changed(made["1.x"][1], tmp_path / "zero", **more))
    said = {"modelspec.prediction_type": "epsilon"}
    assert load(changed(made["2.x"][1], tmp_path / "e", said)).schedule(3).prediction == "epsilon"


@pytest.mark.parametrize(("family", "channels", "taken"), [("1.x", 9, "mask"), ("2.x", 5, "depth")])
@pytest.mark.filterwarnings("ignore:a file of weights")
def test_a_file_whose_network_takes_more_than_latents(
    made: dict[str, tuple[Path, Path]], tmp_path: Path, family: str, channels: int, taken: str
) -> None:
    name, file = "model.diffusion_model.input_blocks.0.0.weight", made[family][1]
    own = load_file(file)[name]
    more = torch.zeros(len(own), channels - own.shape[1], *own.shape[2:])
    file = changed(file, tmp_path / "more", **{name: torch.cat([own, more], dim=1)})
    model, found = load(file), Backbone.describe(file)
    assert (model.further_channels, model.latent_channels) == (taken, 4)
    assert (found.family, found.further_channels) == (type(model), taken)


def test_a_network_that_predicts_noise_is_known_by_what_it_puts_out() -> None:
    miniature = load("miniature")
    assert miniature.scheduler.config.prediction_type == "epsilon"
    assert predicted(miniature.unet) == "epsilon"
    assert predicted(make_unet("2.x")) == "v_prediction"


@pytest.mark.filterwarnings("ignore:a file of weights")
def test_a_file_is_loaded_in_any_dtype(made: dict[str, tuple[Path, Path]]) -> None:
    model = Backbone.load(made["1.x"][1], "cpu", "bfloat16")
    assert isinstance(model, UNetBackbone)
    assert {network.dtype for network in model.networks} == {torch.bfloat16}


def test_a_vocabulary_that_is_not_here(made: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    file = Path(shutil.copy(made["1.x"][1], tmp_path))
    message = rf"has no tokenizer, .* expected a folder {tmp_path}/tokenizer with .* hf download"
    with pytest.raises(ModelError, match=message):
        load(file)


def test_a_file_that_lacks_weights(made: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    whole = load_file(made["1.x"][1])
    file = changed(made["1.x"][1], tmp_path / "lost")
    text = "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.bias"
    for lost, what in (
        ("model.diffusion_model.middle_block.0.in_layers.0.weight", "UNet or the VAE of .* some"),
        ("first_stage_model.decoder.mid.block_1.norm1.weight", "UNet or the VAE of .* some of"),
        (text, "text_encoder of .* 1 of its parameters, such as .*layers.0.mlp.fc1.bias"),
    ):
        save_file({name: w for name, w in whole.items() if name != lost}, file)
        with pytest.raises(ModelError, match=rf"{what}.*; expected a whole checkpoint: fetch it"):
            load(file)
    shape = {"model.diffusion_model.out.0.weight": torch.ones(3)}
    save_file({**whole, **shape}, file)
    with pytest.raises(ModelError, match=r"a network of the model file .* does not load: .*shape"):
        load(file)
    save_file({n: w for n, w in whole.items() if not n.startswith("first_stage_model.")}, file)
    with pytest.raises(ModelError, match=r"has no first_stage_model\..*; expected a whole"):
        load(file)


@pytest.mark.parametrize(
    "names", [["lora_unet_mid_block.alpha"], ["model.diffusion_model.joint_blocks.0.weight"], []]
)
def test_an_unknown_layout(names: list[str], tmp_path: Path) -> None:
    file = tmp_path / "other.safetensors"
    save_file({name: torch.zeros(1) for name in names}, file)
    found = re.escape(names[0]) if names else "none"
    message = rf"another layout: expected a whole .* or SDXL base, .* found {found}; give"
    with pytest.raises(ModelError, match=message):
        load(file)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.ckpt", b"", r"expected a model folder or a \*\.safetensors file, .* may hold"),
        ("a.mp4", b"", r"expected a model folder or a \*\.safetensors file, .*a\.mp4 is none"),
        (
            "a.safetensors",
            pickle.dumps({}),
            r"name of safetensors and holds a pickle, which",
        ),
        ("a.safetensors", b"PK\3\4", r"name of safetensors and holds a pickle, which is not read"),
        ("a.safetensors", b"nothing", r"is no safetensors file, or is damaged: .*; fetch it again"),
    ],
)
def test_files_that_are_not_read(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=message):
        load(tmp_path / name)
