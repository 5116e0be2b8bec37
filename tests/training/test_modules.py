"""What is trained, on one batch: no training run, no weights but the package's."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from tokenflow.diffusion import Backbone
from tokenflow.editors import Canny
from tokenflow.miniature.scenes import Attributes, random_scene
from tokenflow.video import Clip
from training.modules import CROPPED, ControlTraining, DenoiserTraining, NoisePrediction
from training.networks import new_controlnet, new_unet
from training.stills import Endless, canny_edges, without_shape


@pytest.fixture(scope="module")
def miniature() -> Backbone:
    return Backbone.load("miniature", device="cpu", dtype="float32")


@pytest.fixture
def nothing(miniature: Backbone) -> Tensor:
    return tokenized(miniature, [""])[0]


def tokenized(model: Backbone, captions: list[str]) -> Tensor:
    tokens = model.tokenizer(captions, padding="max_length", return_tensors="pt")
    return torch.as_tensor(tokens["input_ids"])


def at_step(stage: NoisePrediction, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if in training, `step` steps of a thousand done."""
    monkeypatch.setattr(NoisePrediction, "trainer", SimpleNamespace(max_steps=1000))
    monkeypatch.setattr(NoisePrediction, "global_step", step)


def control_training(miniature: Backbone, nothing: Tensor) -> ControlTraining:
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(miniature.unet.config)
    unet.load_state_dict(miniature.unet.state_dict())
    return ControlTraining(unet, miniature.text_encoder, nothing)


def test_captions_without_shape_keep_the_other_words_in_their_places(miniature: Backbone) -> None:
    attributes = Attributes.every()
    whole = tokenized(miniature, [str(a) for a in attributes])
    shapeless = tokenized(miniature, [without_shape(a) for a in attributes])
    different = (whole != shapeless).int()
    assert torch.equal(different.sum(dim=1), torch.ones(len(attributes)))
    assert len({tuple(row.tolist()) for row in shapeless}) == 4 * 6 * 6


def test_edges_are_what_the_condition_shows() -> None:
    images = torch.stack([(random_scene(i).frame(0) * 255).round().byte() for i in range(3)])
    shown = Canny().of(Clip.from_frames(images / 255))
    assert torch.equal(canny_edges(images).expand(-1, 3, -1, -1) / 255, shown)


def test_crops_show_the_same_part_of_latents_and_images(
    miniature: Backbone, nothing: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = control_training(miniature, nothing)
    latents = torch.arange(32.0 * 32).view(1, 1, 32, 32)
    images = latents.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    at_step(stage, int(CROPPED * 1000) - 1, monkeypatch)
    seen = set()
    for seed in range(8):
        torch.manual_seed(seed)
        a, b = stage.crop(latents, images)
        assert a.shape[-2:] == (24, 24)
        assert b.shape[-2:] == (96, 96)
        assert torch.equal(a, b[..., ::4, ::4])
        seen.add(float(a[0, 0, 0, 0]))
    assert len(seen) > 4
    at_step(stage, int(CROPPED * 1000), monkeypatch)
    a, b = stage.crop(latents, images)
    assert torch.equal(a, latents)
    assert torch.equal(b, images)


def batch(miniature: Backbone) -> tuple[Tensor, ...]:
    scenes = [random_scene(i) for i in range(4)]
    images = torch.stack([(scene.frame(0) * 255).round().byte() for scene in scenes])
    captions = [[str(s.attributes) for s in scenes], [without_shape(s.attributes) for s in scenes]]
    tokens = [tokenized(miniature, texts) for texts in captions]
    return (miniature.encode(images / 255), canny_edges(images), *tokens)


@pytest.mark.parametrize("step", [0, 999])
def test_only_the_controlnet_learns(
    miniature: Backbone, nothing: Tensor, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    stage = control_training(miniature, nothing)
    at_step(stage, step, monkeypatch)
    loss = stage.loss(*batch(miniature))
    assert loss.isfinite()
    loss.backward()
    learning = {name.split(".")[0] for name, p in stage.named_parameters() if p.grad is not None}
    assert learning == {"controlnet"}


def test_an_untrained_controlnet_changes_nothing(
    miniature: Backbone, nothing: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its zero convolutions: the loss is that of the UNet alone, whatever the edges."""
    stage = control_training(miniature, nothing)
    at_step(stage, 999, monkeypatch)
    latents, edges, *tokens = batch(miniature)
    losses = []
    for shown in (edges, 255 - edges):
        torch.manual_seed(1)
        losses.append(stage.loss(latents, shown, *tokens).item())
    assert losses[0] == losses[1]


def test_the_parts_of_a_denoisers_checkpoint_are_named_as_they_were(nothing: Tensor) -> None:
    names = {name.split(".")[0] for name in DenoiserTraining(94, nothing).state_dict()}
    assert names == {"unet", "text_encoder"}


def test_the_controlnet_fits_the_unet_and_the_latents() -> None:
    network = new_controlnet(new_unet())
    parameters = sum(p.numel() for p in network.parameters())
    assert 2 * parameters < 16 * 2**20  # bytes in float16
    latents, text, edges = (
        torch.randn(1, 4, 8, 8),
        torch.randn(1, 16, 128),
        torch.ones(1, 3, 32, 32),
    )
    with torch.no_grad():
        down, middle = network(latents, 1, text, edges, return_dict=False)
    assert len(down) == 12
    assert middle.shape == (1, 128, 1, 1)


def test_batches_keep_what_belongs_together() -> None:
    numbers = torch.arange(100)
    first, second = next(iter(Endless(numbers, 2 * numbers, batch=16)))
    assert len(first) == 16
    assert torch.equal(2 * first, second)
