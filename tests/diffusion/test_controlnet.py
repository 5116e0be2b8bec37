import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from tests.diffusion.making import make_controlnet
from tests.gaussian_flow import GaussianFlow
from tokenflow.diffusion import Backbone, ModelError, StableDiffusion, load_controlnet


@pytest.fixture
def folder(tmp_path: Path, backbone: StableDiffusion) -> Path:
    """A tiny ControlNet's folder, to be spoilt."""
    return make_controlnet(tmp_path / "controlnet", backbone.unet)


def test_loads_a_frozen_network_in_the_backbones_dtype(
    folder: Path, backbone: StableDiffusion, model_folder: Path
) -> None:
    network = load_controlnet(folder, backbone)
    assert isinstance(network, ControlNetModel)
    assert (network.device, network.dtype) == (backbone.device, torch.float32)
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    expected = ControlNetModel.from_pretrained(folder).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in network.state_dict().items())
    half = Backbone.load(model_folder, device="cpu", dtype="bfloat16")
    assert load_controlnet(str(folder), half).dtype == torch.bfloat16


@pytest.mark.parametrize("model", ["/nowhere/model", "./model", "~/model", "a/b/c"])
def test_a_folder_that_is_not_there(model: str, backbone: StableDiffusion) -> None:
    with pytest.raises(ModelError, match=rf"{model}' does not exist; .* holds config\.json"):
        load_controlnet(model, backbone)


def test_a_folder_in_the_users_home(
    folder: Path, backbone: StableDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert isinstance(load_controlnet(f"~/{folder.name}", backbone), ControlNetModel)


def test_pickled_weights_are_not_read(folder: Path, backbone: StableDiffusion) -> None:
    for file in folder.glob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))
    with pytest.raises(ModelError, match=r"no \*\.safetensors file \(found .*\.bin'\].*convert"):
        load_controlnet(folder, backbone)


@pytest.mark.parametrize("text", [b"{", b"[]", b'{"weight_map": 3}', b"\xff\xfe"])
def test_an_index_that_is_none(text: bytes, folder: Path, backbone: StableDiffusion) -> None:
    (folder / "x.safetensors.index.json").write_bytes(text)
    with pytest.raises(ModelError, match=r"x\.safetensors\.index\.json is no index of weights"):
        load_controlnet(folder, backbone)


def test_a_hub_model_without_network(backbone: StableDiffusion) -> None:
    with pytest.raises(ModelError, match=r"the ControlNet of the hub .* Without network, download"):
        load_controlnet("nobody/no-such-model", backbone)


def test_a_whole_models_folder(model_folder: Path, backbone: StableDiffusion) -> None:
    with pytest.raises(ModelError, match=r"has no \*\.safetensors file \(found no weights\)"):
        load_controlnet(model_folder, backbone)


def test_a_parameter_without_weights(folder: Path, backbone: StableDiffusion) -> None:
    (file,) = folder.glob("*.safetensors")
    weights = load_file(file)
    lost = min(weights)
    del weights[lost]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"the ControlNet .* no weights for 1 .* as .*{lost}"):
        load_controlnet(folder, backbone)


@pytest.mark.parametrize("text", ["{", None])
def test_configuration_that_does_not_parse(
    folder: Path, backbone: StableDiffusion, text: str | None
) -> None:
    file = folder / "config.json"
    file.unlink()
    if text is not None:
        file.write_text(text)
    with pytest.raises(ModelError, match=r"the ControlNet of the model folder .* does not load"):
        load_controlnet(folder, backbone)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cross_attention_dim": 24}, r"expected cross-attention width 16 \(found 24\)"),
        (
            {"block_out_channels": (8, 8, 8, 16), "attention_head_dim": 1},
            r"expected block channels \(8, 8, 16, 16\) \(found \(8, 8, 8, 16\)\)",
        ),
        ({"layers_per_block": 1}, r"expected layers per block 2 \(found 1\)"),
        ({"in_channels": 9}, r"expected latent channels 4 \(found 9\)"),
        (
            {"conditioning_embedding_out_channels": (4, 8, 8, 8)},
            r"expected pixels per latent 2 \(found 8\)",
        ),
        ({"num_class_embeds": 4}, r"expected classes None \(found 4\)"),
        ({"class_embed_type": "timestep"}, r"expected class embedding None \(found timestep\)"),
        ({"conditioning_channels": 1}, r"expected channels of the control image 3 \(found 1\)"),
        (
            {"cross_attention_dim": 32, "layers_per_block": 1},
            r"cross-attention width 16 \(found 32\), layers per block 2 \(found 1\); choose one",
        ),
    ],
)
def test_a_controlnet_of_another_backbone(
    tmp_path: Path, backbone: StableDiffusion, changes: dict[str, Any], message: str
) -> None:
    folder = make_controlnet(tmp_path / "other", backbone.unet, **changes)
    with pytest.raises(ModelError, match=r"other was made for another model: .*" + message):
        load_controlnet(folder, backbone)


def test_a_unets_folder_is_no_controlnet(model_folder: Path, backbone: StableDiffusion) -> None:
    with pytest.raises(ModelError, match=r"no weights for .* such as controlnet_"):
        load_controlnet(model_folder / "unet", backbone)


def test_lists_and_tuples_in_a_configuration_are_the_same(
    folder: Path, backbone: StableDiffusion
) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert isinstance(config["block_out_channels"], list)
    load_controlnet(folder, backbone)


def test_what_is_given_for_each_block_may_be_given_once(
    folder: Path, backbone: StableDiffusion
) -> None:
    def with_unet(**changes: Any) -> StableDiffusion:
        unet = UNet2DConditionModel.from_config({**backbone.unet.config, **changes})
        parts = backbone.vae, backbone.text_encoder, backbone.tokenizer, backbone.scheduler
        return StableDiffusion(unet, *parts)

    each = with_unet(cross_attention_dim=(16,) * 4, layers_per_block=[2] * 4)
    load_controlnet(folder, each)
    with pytest.raises(ModelError, match=r"layers per block \(2, 2, 2, 1\) \(found 2\)"):
        load_controlnet(folder, with_unet(layers_per_block=[2, 2, 2, 1]))


def test_controlnets_are_for_stable_diffusion(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"for Stable Diffusion .*, got a GaussianFlow"):
        load_controlnet(folder, GaussianFlow())
