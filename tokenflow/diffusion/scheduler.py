"""The noise schedule of a model, whatever sampler its configuration names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import diffusers
from diffusers import DDIMScheduler, LCMScheduler

from tokenflow.diffusion.loading import ModelError
from tokenflow.errors import InputError

FAMILIES = (
    "DDIM", "DDPM", "DEIS", "DPMSolver", "Euler", "Heun", "KDPM2", "LCM", "LMS", "PNDM", "SASolver",
    "TCD", "UniPC",
)  # fmt: skip
"""How the names of diffusers' samplers begin whose noise is given by betas, as DDIM's is."""
SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
SPACINGS = ("leading", "linspace", "trailing")
Timesteps = Literal["leading", "linspace", "trailing", "lcm"]
"""How sampling timesteps are spaced, in diffusers' words; "lcm" as `LCMScheduler` spaces them."""
BETAS = ("beta_start", "beta_end", "beta_schedule")
FILE = "scheduler_config.json"


class LCMTimesteps(DDIMScheduler):
    """DDIM at the timesteps that a latent consistency model was distilled for.

    Source: Luo et al. 2023 (arXiv 2310.04378); some of the `original_inference_steps` timesteps.
    """

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        """As `LCMScheduler` does.

        Raises:
            InputError: The model was distilled for fewer.
        """
        most = self.config.original_inference_steps
        if num_inference_steps > most:
            raise InputError(
                f"expected 1 to {most} steps of this model, a latent consistency model that was "
                f"distilled for {most} timesteps, got {num_inference_steps}; 4 to 8 are enough"
            )
        own = LCMScheduler.from_config(self.config)
        own.set_timesteps(num_inference_steps, device)
        self.num_inference_steps, self.timesteps = num_inference_steps, own.timesteps


def read_scheduler(model: str, **options: Any) -> DDIMScheduler:
    """DDIM with the noise schedule of a folder's or hub model's `scheduler_config.json`.

    Raises:
        ModelError: Its noise is not given by betas, or is something else that is not taken.
    """
    config = DDIMScheduler.load_config(model, **options)
    check_config(config)
    if config.get("_class_name") != "LCMScheduler":
        return DDIMScheduler.from_config(config)
    return consistent(config)


def respaced(scheduler: DDIMScheduler, timesteps: str) -> DDIMScheduler:
    """The same noise at timesteps that are spaced so.

    Raises:
        ModelError: There is no such spacing.
    """
    if timesteps == "lcm":
        return consistent(scheduler.config)
    if timesteps not in SPACINGS:
        raise ModelError(
            f"expected timesteps {', '.join(SPACINGS)} or lcm, got {timesteps!r}; few-step models "
            f"of the Turbo and Lightning kind have trailing ones"
        )
    return DDIMScheduler.from_config(scheduler.config, timestep_spacing=timesteps)


def consistent(config: Mapping[str, Any]) -> LCMTimesteps:
    """DDIM at the timesteps of `LCMScheduler`.

    Raises:
        ModelError: The configuration's number of them cannot be.
    """
    scheduler = LCMTimesteps.from_config(config)
    original = config.get("original_inference_steps", 50)  # LCMScheduler's default
    if not isinstance(original, int) or not 1 <= original <= scheduler.config.num_train_timesteps:
        raise ModelError(
            f"the scheduler is LCMScheduler with original_inference_steps {original!r}, expected "
            f"1 to {scheduler.config.num_train_timesteps}; mend it in {FILE}"
        )
    scheduler.register_to_config(original_inference_steps=original)
    return scheduler


def check_config(config: Mapping[str, Any]) -> None:
    """Raises `ModelError` for a configuration that DDIM would fill up with its own defaults."""
    kind = config.get("_class_name")
    who = f"the scheduler is {'of no class' if kind is None else kind}"
    foreign = hasattr(diffusers, str(kind)) and not str(kind).startswith(FAMILIES)
    if foreign or config.get("use_flow_sigmas"):
        raise ModelError(
            f"{who}{'' if foreign else ' with use_flow_sigmas'}, whose noise is not given by "
            f"betas; expected one of diffusers' {', '.join(FAMILIES)}, as Stable Diffusion 1.x and "
            f"2.x have"
        )
    missing = [name for name in BETAS if config.get(name) is None]
    if config.get("beta_schedule") == "squaredcos_cap_v2":
        missing = []  # which has no other parameters
    if config.get("trained_betas") is None and missing:
        raise ModelError(
            f"{who} and {FILE} has no {', '.join(missing)}; expected {', '.join(BETAS)}, or "
            f"trained_betas, as Stable Diffusion 1.x and 2.x have: use the file of the model that "
            f"this one was made from"
        )
    for name, taken in (("beta_schedule", SCHEDULES), ("timestep_spacing", SPACINGS)):
        value = config.get(name, taken[0])  # DDIM's default
        if value not in taken:
            raise ModelError(f"{who} with {name} {value!r}, expected {' or '.join(taken)}")
    if not isinstance(offset := config.get("steps_offset", 0), int):
        raise ModelError(f"{who} with steps_offset {offset!r}, expected a whole number, as 1")


def check_noise(scheduler: DDIMScheduler) -> None:
    """Raises `ModelError` unless the share of signal falls from below 1 to above 0."""
    alphas, steps = scheduler.alphas_cumprod, scheduler.config.num_train_timesteps
    if scheduler.config.rescale_betas_zero_snr and float(alphas[-1]) == 0:
        raise ModelError(
            "the scheduler has rescale_betas_zero_snr: its noisiest latents hold no signal, "
            f"and inversion cannot reach them; turn it off in {FILE}"
        )
    falls = bool((alphas.diff() < 0).all()) and 1 > float(alphas[0]) > float(alphas[-1]) > 0
    if len(alphas) != steps or not falls:
        raise ModelError(
            f"the scheduler's betas make no noise schedule: expected {steps} shares of signal that "
            f"fall from 1 towards 0, got {len(alphas)} from {float(alphas[0]):.3g} to "
            f"{float(alphas[-1]):.3g}; mend the betas in {FILE}"
        )
