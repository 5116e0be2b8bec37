"""A model family of another kind, exactly solvable, through the same contracts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.gaussian_flow import GaussianFlow
from tokenflow.diffusion import Conditioning, frame_noise, invert, reconstruct, source_prediction
from tokenflow.diffusion.backbone import Defaults
from tokenflow.diffusion.inversion import InversionSolver
from tokenflow.editors import DDCM, Editor, FlowEdit, Injection, PnP, Prompts, SDEdit
from tokenflow.engine import Settings, edit_clip
from tokenflow.propagation import NNField
from tokenflow.video import Clip

MEAN = 0.5


def latents() -> Tensor:
    return torch.rand(5, 3, 4, 6, generator=torch.Generator().manual_seed(0))


def errors(steps: int, solver: InversionSolver = "ddim") -> tuple[float, float]:
    """Of inversion against the known path, and of inverting and sampling back."""
    model, clean = GaussianFlow(), latents()
    schedule = model.schedule(steps)
    trajectory = invert(model, clean, f"{MEAN}", schedule, steps, batch=2, solver=solver)
    paths = [model.path(clean, MEAN, schedule.noise[i]) for i in range(steps)]
    back = reconstruct(model, source_prediction(model, f"{MEAN}"), trajectory, schedule)
    return float((trajectory.latents - torch.stack(paths)).abs().max()), float(
        (back - clean).abs().max()
    )


def test_inversion_follows_the_known_path_and_sampling_returns_the_input() -> None:
    (path, back), (finer_path, finer_back) = errors(100), errors(400)
    # Euler's steps are of first order: a quarter of the step, a quarter of the error
    assert finer_path < 0.3 * path
    assert finer_back < 0.3 * back
    assert finer_path < 0.01
    assert finer_back < 0.01


def test_sampling_returns_from_uni_inv_with_an_error_of_second_order() -> None:
    (path, back), (finer_path, finer_back) = (errors(steps, "uni-inv") for steps in (100, 400))
    assert finer_path < 0.3 * path  # sampling's steps are of first order, and so is the path back
    assert finer_back < 0.3**2 * back
    assert back < 0.2 * errors(100)[1]
    # half the evaluations of DDIM's 50 and 50; measured 0.0076 and 0.0097
    assert errors(25, "uni-inv")[1] < errors(50)[1]


def test_more_inversion_steps_than_sampling_steps() -> None:
    model = GaussianFlow()
    schedule = model.schedule(10)
    trajectory = invert(model, latents(), f"{MEAN}", schedule, 400)
    for i in (0, 5, 9):
        expected = model.path(latents(), MEAN, schedule.noise[i])
        assert torch.allclose(trajectory.at(i), expected, rtol=0, atol=0.01)


@pytest.mark.parametrize("consistency", ["none", "joint", "tokenflow"])
def test_an_edit_moves_the_mean(consistency: str) -> None:
    """The exact edit of a Gaussian is a shift by the difference of the prompts' means."""
    clip = Clip.from_frames(latents())
    settings = Settings(steps=200, guidance=1.0, keyframe_every=2, consistency=consistency, batch=2)
    prompts = Prompts("0.75", inversion_prompt=f"{MEAN}")
    editor = SDEdit(1.0)
    edited = edit_clip(GaussianFlow(), clip, prompts, editor, NNField(), settings).latents
    assert torch.allclose(edited, latents() + 0.25, rtol=0, atol=0.02)


@pytest.mark.parametrize("noise", ["independent", "shared"])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_fresh_noise_is_mixed_in_by_the_flows_own_levels(noise: str, strength: float) -> None:
    """Sampling from (1 - σ) x0 + σ n follows the known path; at σ = 1 nothing of x0 is left."""
    clean, mean = latents(), 0.75
    settings = Settings(steps=200, guidance=1.0, consistency="none", seed=3)
    editor = SDEdit(strength, noise)
    edited = edit_clip(
        GaussianFlow(), Clip.from_frames(clean), f"{mean}", editor, NNField(), settings
    ).latents
    frames = range(5) if noise == "independent" else [0] * 5
    drawn = torch.stack([frame_noise(3, frame, clean.shape[1:]) for frame in frames])
    begin = (1 - strength) * clean + strength * drawn
    std = GaussianFlow().std
    spread = ((1 - strength) ** 2 * std**2 + strength**2) ** 0.5 / std
    expected = mean + (begin - (1 - strength) * mean) / spread
    # Euler's error is of first order: twice as large with half of the steps
    assert torch.allclose(edited, expected, rtol=0, atol=0.02)


class WithoutGuidance(GaussianFlow):
    """A distilled model: its own guidance is 1, and it is never asked for a negative prompt."""

    defaults = Defaults(guidance=1.0)

    def predict(
        self, latents: Tensor, t: float, conditioning: Conditioning, **given: Any
    ) -> Tensor:
        assert not (conditioning["mean"] == -1).any()
        return super().predict(latents, t, conditioning, **given)


@pytest.mark.parametrize("editor", [SDEdit(0.5), PnP(0.5, 0.5), FlowEdit(3), DDCM()])
def test_a_model_without_guidance_is_asked_for_no_negative_prompt(editor: Editor) -> None:
    prompts = Prompts("0.75", "-1", f"{MEAN}")
    result = edit_clip(
        WithoutGuidance(share=0.1), Clip.from_frames(latents()), prompts, editor, NNField(),
        Settings(steps=4, keyframe_every=2),
    )  # fmt: skip
    assert (result.latents - latents()).abs().max() > 0.01


def test_attention_of_another_kind_is_joint_and_propagated() -> None:
    clip = Clip.from_frames(latents())
    results = {
        way: edit_clip(
            GaussianFlow(share=0.1), clip, "0.75", SDEdit(1.0), NNField(),
            Settings(steps=4, guidance=2.0, keyframe_every=2, consistency=way),
        ).latents
        for way in ("none", "joint", "tokenflow")
    }  # fmt: skip
    assert not torch.allclose(results["none"], results["joint"], atol=1e-3)
    assert not torch.allclose(results["joint"], results["tokenflow"], atol=1e-3)


def test_an_injection_finds_the_layer_by_its_role() -> None:
    model = GaussianFlow(share=0.1)
    (injection,) = PnP(attention=0.0).injections(model)
    assert isinstance(injection, Injection)
    assert injection.layer == "tokens"
    clip, settings = Clip.from_frames(latents()), Settings(steps=2, consistency="none")
    with_source, free = (
        edit_clip(
            GaussianFlow(share=0.1), clip, "0.75", PnP(0.0, share), NNField(), settings
        ).latents
        for share in (1.0, 0.0)
    )
    assert not torch.allclose(with_source, free, atol=1e-3)
