"""DDCM by its published step, on models that are solved exactly, and through the engine."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.gaussian_flow import GaussianFlow
from tests.gaussian_noise import GaussianNoise
from tokenflow.diffusion import Backbone, Conditioning, Schedule
from tokenflow.editors import DDCM, Prompts
from tokenflow.engine import Settings, edit_clip
from tokenflow.errors import InputError
from tokenflow.propagation import NNField
from tokenflow.testing import tiny_clip
from tokenflow.video import Clip

PROMPTS = Prompts("0.9", "-0.2", "0.4")
STEPS, FRAMES = 4, 3
ROUNDING = 1e-5  # float32, a few steps with guidance, sums in another order


def clip() -> Clip:
    generator = torch.Generator().manual_seed(0)
    return Clip.from_frames(torch.rand(FRAMES, 3, 4, 4, generator=generator))


def edited(model: Backbone, editor: DDCM, prompts: Prompts = PROMPTS, **settings: Any) -> Tensor:
    chosen = Settings(**{"steps": STEPS, "keyframe_every": 2, "batch": 2, **settings})
    return edit_clip(model, clip(), prompts, editor, NNField(), chosen).latents


def published(
    epsilon: Callable[[Tensor, int, str], Tensor],
    x_0: Tensor,
    schedule: Schedule,
    first: int,
    guidance: float,
    noises: Tensor,
) -> Tensor:
    """InfEdit's loop for one image (algorithm 2 and the authors' code, at η = 1), written out."""
    alpha_root, beta_root = schedule.signal, schedule.noise
    x_s = x_t = alpha_root[first] * x_0 + beta_root[first] * noises[first]
    pred_x0 = x_0
    for i in range(first, len(schedule)):
        negative, positive = (epsilon(x_t, i, prompt) for prompt in ("-0.2", "0.9"))
        e_t = negative + guidance * (positive - negative)
        e_s = epsilon(x_s, i, "0.4")
        e_c = (x_s - alpha_root[i] * x_0) / beta_root[i]
        pred_x0 = (x_t - beta_root[i] * (e_t - e_s + e_c)) / alpha_root[i]
        if i + 1 < len(schedule):
            x_t = alpha_root[i + 1] * pred_x0 + beta_root[i + 1] * noises[i + 1]
            x_s = alpha_root[i + 1] * x_0 + beta_root[i + 1] * noises[i + 1]
    return pred_x0


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_every_frame_is_as_in_the_published_loop(strength: float, guidance: float) -> None:
    model = GaussianNoise(share=0.1)
    draws = torch.randn(STEPS, 1, FRAMES, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    editor = DDCM(strength).with_noise(draws)
    found = edited(model, editor, guidance=guidance, consistency="none")
    schedule, first = model.schedule(STEPS), STEPS - round(strength * STEPS)

    def epsilon(x: Tensor, i: int, prompt: str) -> Tensor:
        return model.predict(x[None], float(schedule.timesteps[i]), model.embed([prompt]))[0]

    for frame, x_0 in enumerate(clip().frames):
        expected = published(epsilon, x_0, schedule, first, guidance, draws[:, 0, frame])
        # a prediction of clean latents is divided by the signal, 0.07 at first
        assert torch.allclose(found[frame], expected, rtol=0, atol=10 * ROUNDING)
    assert (found - clip().frames).abs().max() > 0.1


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("model", [GaussianFlow(), GaussianNoise()])
@pytest.mark.parametrize("noise", ["independent", "shared"])
def test_a_gaussians_mean_moves_by_the_prompts_difference(
    model: GaussianFlow, strength: float, noise: str
) -> None:
    """A step leaves the share s² std² / (s² std² + n²) of what is missing."""
    found = edited(model, DDCM(strength, noise=noise), guidance=1.0)
    one, missing = model.schedule(STEPS), 1.0
    for i in range(STEPS - round(strength * STEPS), STEPS):
        kept = (one.signal[i] * model.std) ** 2
        missing *= kept / (kept + one.noise[i] ** 2)
    exact = torch.tensor((0.9 - 0.4) * (1 - missing))
    assert torch.allclose(found - clip().frames, exact, rtol=0, atol=10 * ROUNDING)
    assert strength < 1 or math.isclose(missing, 0, abs_tol=1e-2)


@pytest.mark.parametrize("consistency", ["none", "joint", "tokenflow"])
def test_the_source_comes_back_exactly_where_both_sides_are_alike(
    backbone: Backbone, consistency: str
) -> None:
    source = tiny_clip(3)
    settings = Settings(steps=2, keyframe_every=2, guidance=1.0, consistency=consistency)
    found = edit_clip(
        backbone, source, Prompts("a ball", "", "a ball"), DDCM(), NNField(), settings
    )
    assert torch.allclose(found.latents, backbone.encode(source.frames), rtol=0, atol=ROUNDING)


def test_a_guidance_of_1_runs_two_branches(backbone: Backbone) -> None:
    rows: list[int] = []
    own = backbone.predict

    def counted(latents: Tensor, *args: Any, **given: Any) -> Tensor:
        rows.append(len(latents))
        return own(latents, *args, **given)

    backbone.predict = counted  # type: ignore[method-assign]
    try:
        for guidance in (1.0, 2.0):
            settings = Settings(steps=1, guidance=guidance, consistency="none")
            edit_clip(backbone, tiny_clip(2), PROMPTS, DDCM(), NNField(), settings)
    finally:
        del backbone.predict
    assert rows == [2 * 2, 3 * 2]


class Told(GaussianFlow):
    """The mean is shifted by the scale of guidance, which is an input."""

    def embed(self, prompts: Sequence[str]) -> Conditioning:
        return Conditioning(**super().embed(prompts).tensors, guidance=torch.ones(len(prompts), 1))

    def predict(self, latents: Tensor, t: float, conditioning: Conditioning, **_: Any) -> Tensor:
        mean = conditioning["mean"] + conditioning["guidance"][:, 0]
        return super().predict(latents, t, Conditioning(mean=mean))


@pytest.mark.parametrize(("guidance_source", "shift"), [(None, 0.0), (1.5, 2.5)])
def test_a_network_that_embeds_guidance_is_given_one_scale(
    guidance_source: float | None, shift: float
) -> None:
    found = edited(Told(), DDCM(guidance_source=guidance_source), guidance=4.0)
    move = torch.tensor(0.5 + shift)
    assert torch.allclose(found - clip().frames, move, rtol=0, atol=10 * ROUNDING)


def test_a_latent_consistency_model_is_edited_at_its_own_timesteps(
    model_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "lcm")
    file = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text()) | {"_class_name": "LCMScheduler"}
    file.write_text(json.dumps(config))
    model = Backbone.load(folder, "cpu", "float32")
    assert model.schedule(4).timesteps == (999, 759, 499, 259)
    settings = Settings(steps=4, guidance=1.0, keyframe_every=2)
    found = edit_clip(model, tiny_clip(3), PROMPTS, DDCM(), NNField(), settings)
    assert found.latents.isfinite().all()
    with pytest.raises(InputError, match=r"expected 1 to 50 steps .* consistency model .* got 51"):
        model.schedule(51)


def test_bad_options() -> None:
    with pytest.raises(InputError, match="strength is the share of the steps"):
        DDCM(strength=1.5)
    with pytest.raises(InputError, match="noise must be one of independent, shared"):
        DDCM(noise="inverted")
