"""An image as a prompt, beside diffusers' pipeline with the same adapter."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from tests.diffusion.making import Plain, pipeline_of, write_tiny_xl
from tests.gaussian_flow import GaussianFlow
from tokenflow.diffusion import Backbone, ModelError, Trajectory
from tokenflow.diffusion.unet import UNetBackbone
from tokenflow.editors import IPAdapter, Prompts, SDEdit
from tokenflow.engine import Settings, SourceCache, edit_clip, edit_latents
from tokenflow.errors import InputError
from tokenflow.propagation import NNField
from tokenflow.testing import tiny_clip
from tokenflow.testing.state import backbone_state
from tokenflow.testing.threads import on_ranks
from tokenflow.video import Clip, write_image

SIDE, WIDTH, TOKENS = 32, 10, 4
FILE = "adapter.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image, and an image encoder."""
    folder = tmp_path_factory.mktemp("made")
    generator = torch.Generator().manual_seed(0)
    write_image(folder / "image.png", torch.rand(3, 40, 50, generator=generator))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = CLIPVisionConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
            image_size=SIDE, patch_size=8, projection_dim=WIDTH,
        )  # fmt: skip
        CLIPVisionModelWithProjection(config).save_pretrained(folder / "encoder")
    return folder


def written(folder: Path, model: UNetBackbone, **changes: Tensor) -> Path:
    """An adapter of random weights."""
    generator = torch.Generator().manual_seed(1)
    width = model.unet.config.cross_attention_dim

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * shape[-1] ** -0.5

    weights = {
        "image_proj.proj.weight": random(TOKENS * width, WIDTH),
        "image_proj.proj.bias": random(TOKENS * width),
        "image_proj.norm.weight": 1 + random(width),
        "image_proj.norm.bias": random(width),
    }
    for number, site in enumerate(model.cross_attention().values()):
        for side in ("k", "v"):
            shape = site.layer.to_k.weight.shape
            weights[f"ip_adapter.{2 * number + 1}.to_{side}_ip.weight"] = random(*shape)
    save_file(weights | changes, folder / FILE)
    return folder / FILE


def options(made: Path, file: Path) -> dict[str, Any]:
    return {
        "model": str(file), "image": str(made / "image.png"), "image_encoder": str(made / "encoder")
    }  # fmt: skip


class Sampling(Plain, IPAdapter):
    """Samples under an image prompt, by no other editor."""


@pytest.mark.parametrize("kind", ["sd", "xl"])
def test_sampling_is_diffusers_pipeline(
    model_folder: Path, made: Path, tmp_path: Path, kind: str
) -> None:
    folder = model_folder if kind == "sd" else write_tiny_xl(tmp_path / "model")
    model = Backbone.load(folder, "cpu", "float32")
    assert isinstance(model, UNetBackbone)
    file, steps = written(tmp_path, model), 3
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    schedule = model.schedule(steps)

    def sampled(editor: Any) -> Tensor:
        return edit_latents(
            model, Trajectory.empty(noise, schedule, None), schedule, Prompts("a ball", "a box"),
            editor, NNField(), Settings(steps=steps, guidance=4.0, consistency="none"), x=noise,
        )  # fmt: skip

    editor = Sampling(**options(made, file), scale=0.6)
    editor.prepare(model, Clip.from_frames(torch.rand(2, 3, 16, 16)))
    found, plain = sampled(editor), sampled(Plain())
    pipeline = pipeline_of(model)  # whose network the adapter changes
    encoder = CLIPVisionModelWithProjection.from_pretrained(made / "encoder")
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SIDE)
    pipeline.register_modules(image_encoder=encoder, feature_extractor=processor)
    pipeline.load_ip_adapter(str(tmp_path), "", FILE, image_encoder_folder=None)
    pipeline.set_ip_adapter_scale(0.6)
    expected = pipeline(
        2 * ["a ball"], negative_prompt=2 * ["a box"], height=16, width=16, latents=noise.clone(),
        num_inference_steps=steps, guidance_scale=4.0, output_type="latent",
        ip_adapter_image=Image.open(made / "image.png"),
    ).images  # fmt: skip
    # float32, sums in another order, through three guided steps of latents up to 6
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert (found - plain).abs().max() > 0.05


@pytest.fixture(scope="module")
def file(backbone: UNetBackbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("adapter"), backbone)


def test_a_clip_is_edited_and_the_source_left_alone(
    backbone: UNetBackbone, made: Path, file: Path
) -> None:
    clip, before, cache = tiny_clip(3), backbone_state(backbone), SourceCache()
    settings = Settings(steps=2, keyframe_every=2, guidance=2.0)

    def edited(editor: Any, cache: SourceCache | None = None, **given: Any) -> Tensor:
        prompts, model = Prompts("a ball", "", "a box"), given.pop("model", backbone)
        return edit_clip(
            model, clip, prompts, editor, NNField(), settings, source_cache=cache, **given
        ).latents

    plain, adapter = edited(SDEdit(1.0)), IPAdapter(**options(made, file), strength=1.0)
    prompted = edited(adapter, cache)
    assert (prompted - plain).abs().amax(dim=(1, 2, 3)).min() > 0.05
    # float32 sums in batches of another size
    assert torch.allclose(edited(adapter, cache), prompted, rtol=0, atol=1e-4)
    unscaled = IPAdapter(**options(made, file), strength=1.0, scale=0.0)
    assert torch.allclose(edited(unscaled), plain, rtol=0, atol=1e-4)
    assert backbone_state(backbone) == before
    models, own = ([copy.deepcopy(one) for _ in range(2)] for one in (backbone, adapter))
    halves = on_ranks(2, lambda r: edited(own[r.rank], model=models[r.rank], ranks=r))
    assert torch.allclose(torch.cat(halves), prompted, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_proj.proj.weight": torch.zeros(64, 12)}, "of width 10, expected 12, .* trained"),
        ({"ip_adapter.3.to_v_ip.weight": torch.zeros(8, 9)}, r"another model: .* got \(8, 9\)"),
    ],
)
def test_what_does_not_fit(
    backbone: UNetBackbone, made: Path, tmp_path: Path, changes: dict[str, Tensor], message: str
) -> None:
    file = written(tmp_path, backbone, **changes)
    with pytest.raises(ModelError, match=message):
        IPAdapter(**options(made, file)).prepare(backbone, tiny_clip(1))


def test_what_is_refused(backbone: UNetBackbone, made: Path, file: Path, tmp_path: Path) -> None:
    given = options(made, file)
    with pytest.raises(ModelError, match=r"2\.x and SDXL, got a GaussianFlow; choose"):
        IPAdapter(**given).prepare(GaussianFlow(), tiny_clip(1))
    save_file({"image_proj.latents": torch.zeros(1)}, tmp_path / "plus.safetensors")
    plus = {**given, "model": str(tmp_path / "plus.safetensors")}
    with pytest.raises(ModelError, match=r"expected the plain kind, .* got Plus, Full"):
        IPAdapter(**plus).prepare(backbone, tiny_clip(1))
    for number in range(2):
        write_image(tmp_path / "several" / f"{number}.png", torch.rand(3, 8, 8))
    several = {**given, "image": str(tmp_path / "several")}
    with pytest.raises(InputError, match="several images: expected one image"):
        IPAdapter(**several).prepare(backbone, tiny_clip(1))
    with pytest.raises(InputError, match="scale is a number from 0 up, got -1"):
        IPAdapter(**given, scale=-1.0)
    with pytest.raises(InputError, match="needs prepare"):
        IPAdapter(**given).cache_key(0)
