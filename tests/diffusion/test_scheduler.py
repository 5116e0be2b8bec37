"""Which schedulers' configurations give a noise schedule, and which are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler

from tests.gaussian_flow import GaussianFlow
from tokenflow.diffusion import Backbone, ModelError, Schedule
from tokenflow.diffusion.scheduler import Timesteps, check_noise, read_scheduler, respaced
from tokenflow.errors import InputError

STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def test_another_spacing(model_folder: Path, tmp_path: Path) -> None:
    plain = Backbone.load(model_folder, "cpu", "float32")
    first: dict[Timesteps, int] = {"leading": 751, "trailing": 999, "linspace": 999, "lcm": 999}
    for timesteps, noisiest in first.items():
        found = Backbone.load(model_folder, "cpu", "float32", timesteps=timesteps)
        assert found.schedule(4).timesteps[0] == noisiest
        assert (found.fingerprint == plain.fingerprint) == (timesteps == "leading")
    file = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    shutil.copytree(model_folder, tmp_path / "model")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_class_name": "LCMScheduler"}))
    own, led = (
        Backbone.load(tmp_path / "model", "cpu", "float32", timesteps=timesteps)
        for timesteps in (None, "leading")
    )
    assert own.schedule(4).timesteps != led.schedule(4).timesteps
    assert own.fingerprint != led.fingerprint
    with pytest.raises(ModelError, match=r"expected timesteps leading, .* or lcm, got 'turbo'"):
        plain.respace("turbo")
    with pytest.raises(ModelError, match="GaussianFlow has timesteps of its own; leave timesteps"):
        GaussianFlow().respace("trailing")


def read(folder: Path, config: Any) -> DDIMScheduler:
    (folder / "scheduler_config.json").write_text(json.dumps(config))
    scheduler = read_scheduler(str(folder))
    check_noise(scheduler)
    return scheduler


BY_BETAS = (
    "DDIM", "DDPM", "DEISMultistep", "DPMSolverMultistep", "DPMSolverSDE", "DPMSolverSinglestep",
    "EulerAncestralDiscrete", "EulerDiscrete", "HeunDiscrete", "KDPM2AncestralDiscrete",
    "KDPM2Discrete", "LCM", "LMSDiscrete", "PNDM", "SASolver", "TCD", "UniPCMultistep",
    "SomebodysOwn",
)  # fmt: skip
OTHERS = (
    "CMStochasticIterative", "CogVideoXDDIM", "CosineDPMSolverMultistep", "EDMDPMSolverMultistep",
    "EDMEuler", "FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete", "FlowMatchLCM", "IPNDM",
    "KarrasVe", "SCM", "ScoreSdeVe", "UnCLIP", "VQDiffusion",
)  # fmt: skip


@pytest.mark.parametrize("name", BY_BETAS)
def test_samplers_whose_noise_is_given_by_betas(tmp_path: Path, name: str) -> None:
    config = {"_class_name": f"{name}Scheduler", "use_karras_sigmas": True, **STABLE_DIFFUSION}
    alphas = read(tmp_path, config).alphas_cumprod
    assert torch.equal(alphas, DDIMScheduler(**STABLE_DIFFUSION).alphas_cumprod)


@pytest.mark.parametrize("leftover", [{}, STABLE_DIFFUSION], ids=["alone", "with betas"])
@pytest.mark.parametrize("name", OTHERS)
def test_samplers_of_other_families(tmp_path: Path, name: str, leftover: dict[str, Any]) -> None:
    config = {"_class_name": f"{name}Scheduler", "num_train_timesteps": 1000, **leftover}
    with pytest.raises(ModelError, match=f"is {name}Scheduler, whose .* expected one of .* DDIM,"):
        read(tmp_path, config)


EULER = {"_class_name": "EulerDiscreteScheduler", **STABLE_DIFFUSION}
BAD = {
    "nothing": ({}, "of no class and .* has no beta_start, beta_end, beta_schedule; expected"),
    "no betas": ({"_class_name": "EulerDiscreteScheduler"}, "is EulerDiscreteScheduler and .* no"),
    "an unknown class without betas": (
        {"_class_name": "Mine", "shift": 3.0},
        "is Mine and .* no b",
    ),
    "betas that are empty": (EULER | {"beta_start": None}, "has no beta_start; expected"),
    "no schedule": ({"beta_start": 0.00085, "beta_end": 0.012}, "has no beta_schedule"),
    "flow": (EULER | {"use_flow_sigmas": True}, "is Euler.* with use_flow_sigmas, whose noise"),
    "another schedule": (EULER | {"beta_schedule": "sigmoid"}, "beta_schedule 'sigmoid', expected"),
    "another spacing": (EULER | {"timestep_spacing": "log"}, "timestep_spacing 'log', expected"),
    "no signal at the end": (EULER | {"rescale_betas_zero_snr": True}, "turn it off in"),
    "betas beyond 1": (EULER | {"beta_end": 12}, "make no noise schedule: expected 1000"),
    "betas below 0": (EULER | {"beta_start": -0.1, "beta_schedule": "linear"}, "make no noise"),
    "betas that are NaN": (EULER | {"beta_end": float("nan")}, "make no noise schedule"),
    "few betas": ({"trained_betas": [0.1, 0.2]}, "expected 1000 shares .* got 2"),
    "an offset of text": (EULER | {"steps_offset": "1"}, "steps_offset '1', expected a whole"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused(tmp_path: Path, case: str) -> None:
    config, message = BAD[case]
    with pytest.raises(ModelError, match=message):
        read(tmp_path, config)


@pytest.mark.parametrize(
    "config",
    [
        {"trained_betas": [0.1] * 10, "num_train_timesteps": 10},
        {"beta_schedule": "squaredcos_cap_v2"},
    ],
)
def test_betas_of_another_form(tmp_path: Path, config: dict[str, Any]) -> None:
    alphas = read(tmp_path, config).alphas_cumprod
    assert torch.equal(alphas, DDIMScheduler(**config).alphas_cumprod)


def test_a_model_of_another_family(model_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"scheduler is FlowMatchEulerDiscreteScheduler"):
        Backbone.load(folder, "cpu", "float32")


@pytest.mark.parametrize("original", [50, 20])
def test_a_latent_consistency_model_has_its_own_timesteps(tmp_path: Path, original: int) -> None:
    own = LCMScheduler(**STABLE_DIFFUSION, original_inference_steps=original)
    own.save_pretrained(tmp_path)
    scheduler = read_scheduler(str(tmp_path))
    for steps in (1, 4, 7, original):
        own.set_timesteps(steps)
        assert Schedule.from_ddim(scheduler, steps).timesteps == tuple(own.timesteps.tolist())
    plain = respaced(respaced(scheduler, "trailing"), "lcm")  # which keeps what it does not use
    assert Schedule.from_ddim(plain, 4).timesteps == Schedule.from_ddim(scheduler, 4).timesteps
    with pytest.raises(InputError, match=f"expected 1 to {original} steps .* {original + 1}; 4 to"):
        Schedule.from_ddim(scheduler, original + 1)
    config = {"_class_name": "LCMScheduler", "original_inference_steps": 0, **STABLE_DIFFUSION}
    with pytest.raises(ModelError, match="original_inference_steps 0, expected 1 to 1000"):
        read(tmp_path, config)
