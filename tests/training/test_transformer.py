"""The transformer's training on one batch, and the folder that it writes in diffusers' pipeline."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor, nn
from transformers import CLIPTokenizer

from tokenflow.diffusion import Backbone
from tokenflow.miniature import WEIGHTS
from tokenflow.miniature.scenes import random_scene
from training.networks import new_transformer
from training.stills import near_objects
from training.train import new_flow_training, save_transformer
from training.transformer import OBJECT, FlowTraining

CAPTIONS = ["a striped red ball on grass", ""]


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    tokenizer = CLIPTokenizer.from_pretrained(WEIGHTS / "tokenizer")
    return torch.as_tensor(
        tokenizer(CAPTIONS, padding="max_length", return_tensors="pt")["input_ids"]
    )


@pytest.fixture(scope="module")
def stage(tokens: Tensor) -> FlowTraining:
    """With random weights where training begins with zeros, of two blocks."""
    torch.manual_seed(0)
    stage = new_flow_training(new_transformer(blocks=2), tokens[1])
    for parameter in stage.transformer.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return stage


def at_step(stage: FlowTraining, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if in training, `step` steps of a thousand done."""
    monkeypatch.setattr(FlowTraining, "trainer", SimpleNamespace(max_steps=1000))
    monkeypatch.setattr(FlowTraining, "global_step", step)


def test_prompts_are_those_of_diffusers_pipeline(
    stage: FlowTraining, tokens: Tensor, tmp_path: Path
) -> None:
    """The folder loads, and its network sees 256 tokens of padding as training's sees one."""
    save_transformer(stage, tmp_path)
    pipe = StableDiffusion3Pipeline.from_pretrained(
        tmp_path, text_encoder_3=None, tokenizer_3=None, torch_dtype=torch.float32
    )
    text, nothing, pooled, nothing_pooled = pipe.encode_prompt(CAPTIONS[0], None, None)
    assert text.shape == (1, 16 + 256, 192)
    stage.float()
    latents, t = torch.randn(2, 4, 32, 32), torch.tensor([300.0, 900.0])
    with torch.inference_mode():
        expected = pipe.transformer(
            latents, torch.cat([text, nothing]), torch.cat([pooled, nothing_pooled]), t
        ).sample
        torch.testing.assert_close(
            stage.transformer(latents, *stage.embedded(tokens), t).sample,
            expected,
            atol=1e-4,
            rtol=0,
        )
    assert expected.std() > 0.1
    assert (expected[0] - expected[1]).abs().max() > 0.1
    assert Backbone.load(tmp_path, "cpu", "float32").defaults.guidance == 3


def test_crops_keep_their_places(stage: FlowTraining, monkeypatch: pytest.MonkeyPatch) -> None:
    at_step(stage, 0, monkeypatch)
    latents = torch.randn(1, 4, 32, 32)
    with torch.inference_mode():
        whole = stage.transformer.pos_embed(latents).view(16, 16, -1)
        seen = set()
        for seed in range(8):
            torch.manual_seed(seed)
            crop, same = stage.crop(latents, latents)
            assert torch.equal(crop, same)
            assert crop.shape == (1, 4, 24, 24)
            top, left = stage.corner
            part = stage.transformer.pos_embed(crop).view(12, 12, -1)
            torch.testing.assert_close(part, whole[top : top + 12, left : left + 12])
            seen.add(stage.corner)
    assert len(seen) > 4
    at_step(stage, 1000, monkeypatch)
    assert torch.equal(stage.crop(latents)[0], latents)


def test_positions_of_whole_latents_are_diffusers_own(stage: FlowTraining) -> None:
    stage.corner = (0, 0)
    expected = type(stage.transformer.pos_embed).cropped_pos_embed(
        stage.transformer.pos_embed, 32, 32
    )
    assert torch.equal(stage.positions(32, 32), expected)


def test_an_untrained_transformer_predicts_nothing(
    tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the loss is the flow's mean square: of the noise, its mean and the latents."""
    stage = new_flow_training(new_transformer(blocks=1), tokens[1])
    at_step(stage, 0, monkeypatch)
    torch.manual_seed(0)
    latents, near = torch.full((16, 4, 32, 32), 2.0), torch.zeros(16, 1, 32, 32)
    loss = stage.loss(latents, tokens[:1].expand(16, -1), near)
    assert loss.item() == pytest.approx(4 + 1 + 0.01, rel=0.05)


def test_errors_near_the_object_count_more_unless_noise_hides_it(
    tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = new_flow_training(new_transformer(blocks=1), tokens[1])
    at_step(stage, 1000, monkeypatch)
    latents, text = torch.full((16, 4, 32, 32), 2.0), tokens[:1].expand(16, -1)
    ratios = []
    for sigma in (0.5, 0.96):
        drawn = (torch.tensor(sigma).logit() - 0.4) / 1.2

        def randn(*shape: int, drawn: Tensor = drawn, **_: object) -> Tensor:
            return drawn.expand(shape) if len(shape) == 1 else torch.zeros(shape)

        monkeypatch.setattr(torch, "randn", randn)
        monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
        losses = [stage.loss(latents, text, torch.full((16, 1, 32, 32), x)) for x in (0.0, 1.0)]
        ratios.append(float(losses[1] / losses[0]))
    assert ratios == [pytest.approx(1 + OBJECT), pytest.approx(1)]


def test_what_is_near_is_a_disc_around_the_object(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.stills.SCENES", 5)
    near = near_objects(32)
    for seed, disc in enumerate(near):
        mask = random_scene(seed).mask(0)[None, None]
        touched = torch.nn.functional.max_pool2d(mask, 4)[0] > 0.5
        assert disc[touched].all()
        assert disc.mean() < 4 * touched.float().mean() + 0.05


def test_transformer_and_text_encoders_learn(
    stage: FlowTraining, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_step(stage, 500, monkeypatch)
    stage.loss(torch.randn(2, 4, 32, 32), tokens, torch.ones(2, 1, 32, 32)).backward()
    learning = {
        name.split(".")[0]
        for name, p in stage.named_parameters()
        if p.grad is not None and p.grad.any()
    }
    assert learning == {"transformer", "text_encoder", "text_encoder_2"}
    stage.zero_grad()


def test_the_transformer_fits_the_package() -> None:
    assert 2 * sum(p.numel() for p in new_transformer().parameters()) < 16 * 2**20
