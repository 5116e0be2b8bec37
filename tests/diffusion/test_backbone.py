"""Which family a model belongs to, by its index."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gaussian_flow import GaussianFlow
from tokenflow.diffusion import Backbone, Flux, ModelError, StableDiffusion, StableDiffusion3
from tokenflow.diffusion.backbone import default_dtype


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's folder, with nothing in it."""
    (tmp_path / "model").mkdir()
    return tmp_path / "model"


def name(folder: Path, pipeline: str, *parts: str, **kinds: str) -> None:
    """Writes an index that names a pipeline, with these components, of these classes."""
    found = {**dict.fromkeys(parts, "Some"), **kinds}
    index = {"_class_name": pipeline, **{part: ["library", kind] for part, kind in found.items()}}
    (folder / "model_index.json").write_text(json.dumps(index))


UNET, CLIP, VAE = "UNet2DConditionModel", "CLIPTextModel", "AutoencoderKL"


@pytest.mark.parametrize(
    "pipeline", ["StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "SomebodysPipeline"]
)
def test_a_pipeline_with_a_unet_is_stable_diffusion(
    model_folder: Path, tmp_path: Path, pipeline: str
) -> None:
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    name(folder, pipeline, unet=UNET, text_encoder=CLIP, vae=VAE)
    assert type(Backbone.load(folder, "cpu", "float32")) is StableDiffusion


def test_a_folder_without_an_index_is_stable_diffusion(model_folder: Path) -> None:
    assert not (model_folder / "model_index.json").exists()
    assert type(Backbone.load(model_folder, "cpu", "float32")) is StableDiffusion


def test_an_installed_family_is_found_by_its_pipeline(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "gaussian-1.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: gaussian\nVersion: 1\n")
    entry = "[tokenflow.backbones]\nGaussianFlowPipeline = tests.gaussian_flow:GaussianFlow\n"
    (package / "entry_points.txt").write_text(entry)
    monkeypatch.syspath_prepend(str(package.parent))
    name(folder, "GaussianFlowPipeline", "transformer")
    assert type(Backbone.load(folder, "cpu", "float32")) is GaussianFlow


@pytest.mark.parametrize(
    ("pipeline", "kinds"),
    [
        ("WanPipeline", {"transformer": "WanTransformer3DModel"}),
        ("StableVideoDiffusionPipeline", {"unet": "UNetSpatioTemporalConditionModel"}),
        ("TextToVideoSDPipeline", {"unet": "UNet3DConditionModel", "text_encoder": CLIP}),
        ("KolorsPipeline", {"unet": UNET, "text_encoder": "ChatGLMModel", "vae": VAE}),
        ("IFPipeline", {"unet": UNET, "text_encoder": "T5EncoderModel"}),
        ("KandinskyV22Pipeline", {"unet": UNET, "movq": "VQModel"}),
        ("KandinskyPipeline", {"unet": UNET, "text_encoder": "MultilingualCLIP", "vae": VAE}),
    ],
)
def test_a_family_that_is_not_installed(folder: Path, pipeline: str, kinds: dict[str, str]) -> None:
    name(folder, pipeline, **kinds)
    message = rf"is a {pipeline}, expected one of .*StableDiffusionPipeline.*; choose a model"
    for way in (Backbone.load, Backbone.describe):
        with pytest.raises(ModelError, match=message):
            way(folder)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_an_index_that_does_not_parse(folder: Path, text: str) -> None:
    (folder / "model_index.json").write_text(text)
    with pytest.raises(ModelError, match=r"model_index\.json of the model"):
        Backbone.load(folder, "cpu", "float32")


@pytest.mark.parametrize(
    ("device", "flags", "expected"),
    [
        ("cpu", {"avx512_bf16": True, "amx_bf16": False}, torch.bfloat16),
        ("cpu", {"avx512_bf16": False, "amx_bf16": True}, torch.bfloat16),
        ("cpu", {"avx512_bf16": False, "avx512_f": True}, torch.float32),
        ("cpu", {"architecture": "arm", "bf16": True}, torch.float32),
        ("cuda", {"avx512_bf16": True}, torch.float16),
    ],
)
def test_auto_is_the_dtype_that_the_device_computes_in(
    monkeypatch: pytest.MonkeyPatch, device: str, flags: dict[str, Any], expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags, raising=False)
    assert default_dtype(device) == expected


def test_a_family_may_have_another_dtype_on_an_accelerator() -> None:
    assert default_dtype("cuda", Flux.half) == torch.bfloat16
    assert {StableDiffusion.half, StableDiffusion3.half} == {torch.float16}


def test_auto_is_float32_where_pytorch_cannot_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert default_dtype("cpu") == torch.float32


def test_auto_is_float32_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert default_dtype("cpu") == torch.float32


def test_a_model_is_loaded_in_the_dtype_of_its_device(model_folder: Path) -> None:
    assert Backbone.load(model_folder, "cpu").dtype == default_dtype("cpu")


def test_an_unknown_dtype(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"dtype must be one of .*'bfloat16'\), got 'float8'"):
        Backbone.load(folder, dtype="float8")


def test_a_family_states_its_whole_contract() -> None:
    class Half(Backbone):
        network = torch.nn.Identity()

    with pytest.raises(TypeError, match="abstract"):
        Half()  # type: ignore[abstract]
