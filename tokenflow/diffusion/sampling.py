"""DDIM (Song et al. 2021, arXiv 2010.02502), in both directions, and guidance."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler
from jaxtyping import Float
from torch import Tensor

from tokenflow.errors import DivergedError, InputError


@dataclass(frozen=True)
class Schedule:
    """The noise schedule of a model and the timesteps that sampling visits, noisiest first.

    `alphas` has shape (train_steps,): the share of signal variance left at each timestep.
    """

    alphas: Float[Tensor, " train_steps"]
    final_alpha: float
    timesteps: tuple[int, ...]
    prediction: str

    @classmethod
    def from_scheduler(cls, scheduler: DDIMScheduler, steps: int) -> Schedule:
        """`steps` timesteps, spaced and offset as the scheduler's configuration says."""
        if not 1 <= steps <= scheduler.config.num_train_timesteps:
            raise InputError(
                f"expected 1 to {scheduler.config.num_train_timesteps} steps, got {steps}"
            )
        scheduler.set_timesteps(steps)
        # diffusers' "trailing" spacing adds a timestep of -1 for some numbers of steps, as 61
        timesteps = tuple(int(t) for t in scheduler.timesteps if t >= 0)
        if timesteps[0] >= scheduler.config.num_train_timesteps:
            raise InputError(
                f"{steps} steps and the scheduler's offset of {scheduler.config.steps_offset} "
                f"reach timestep {timesteps[0]}, past the model's last; take fewer steps"
            )
        return cls(
            alphas=scheduler.alphas_cumprod,
            final_alpha=float(scheduler.final_alpha_cumprod),
            timesteps=timesteps,
            prediction=scheduler.config.prediction_type,
        )

    def alpha(self, t: int | None) -> float:
        """ᾱ_t; `None` stands for the clean latent, below the first timestep."""
        return self.final_alpha if t is None else float(self.alphas[t])

    def following(self, t: int) -> int | None:
        """The timestep that sampling visits after `t`, `None` after the last."""
        i = self.timesteps.index(t) + 1
        return self.timesteps[i] if i < len(self.timesteps) else None

    def share(self, t: int) -> float:
        """How much of the schedule lies behind at `t`: i / N at step i of N."""
        return sum(other > t for other in self.timesteps) / len(self.timesteps)

    def epsilon(self, output: Tensor, x: Tensor, t: int) -> Tensor:
        """The noise that a model's output means: v-prediction is ε = √ᾱ v + √(1-ᾱ) x."""
        if self.prediction == "epsilon":
            return output
        a = self.alpha(t)
        return a**0.5 * output + (1 - a) ** 0.5 * x


def ddim_step(x: Tensor, epsilon: Tensor, a_from: float, a_to: float) -> Tensor:
    """Equation 12 of DDIM with σ = 0: the same step denoises (a_to > a_from) and inverts."""
    x0 = clean_estimate(x, epsilon, a_from)
    return a_to**0.5 * x0 + (1 - a_to) ** 0.5 * epsilon


def clean_estimate(x: Tensor, epsilon: Tensor, a: float) -> Tensor:
    """The clean latent that x and its noise imply."""
    return (x - (1 - a) ** 0.5 * epsilon) / a**0.5


def guide(negative: Tensor, prompt: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (Ho and Salimans 2022); a scale of 1 is the prompt alone."""
    return negative + scale * (prompt - negative)


def require_finite(values: Tensor, where: str) -> None:
    """Raises a `DivergedError` that says `where` when a value is NaN or infinite."""
    if not torch.isfinite(values).all():
        raise DivergedError(
            f"NaN or infinite values in {where}; "
            f"this happens with float16 on some models: try dtype bfloat16 or float32, "
            f"or a lower guidance scale"
        )
