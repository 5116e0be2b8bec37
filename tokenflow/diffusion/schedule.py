"""Noise schedules: one formula for models that predict noise, velocity, or flow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from tokenflow.errors import DivergedError, InputError

PredictionType = Literal["epsilon", "v_prediction", "flow"]
Timestep = int | float
"""What a network is given for a noise level: its number in training, or a time."""


@dataclass(frozen=True)
class Schedule:
    """The noise levels that sampling visits: x_i = signal[i] · x0 + noise[i] · n.

    `timesteps[i]` is what the network is given at step i, noisiest first. `signal` and `noise`
    have one entry more, for the clean latent at the end. `prediction` is what the network puts
    out: "epsilon" the noise n; "v_prediction" signal · n - noise · x0 (Salimans and Ho 2022,
    arXiv 2202.00512); "flow" n - x0, where signal + noise = 1 (Liu et al. 2022, arXiv 2209.03003).
    """

    timesteps: tuple[Timestep, ...]
    signal: tuple[float, ...]
    noise: tuple[float, ...]
    prediction: PredictionType = "epsilon"

    def __post_init__(self) -> None:
        if not len(self.signal) == len(self.noise) == len(self.timesteps) + 1 > 1:
            raise ValueError(
                f"a schedule needs one noise level per timestep and the clean one, got "
                f"{len(self.timesteps)} timesteps, {len(self.signal)} and {len(self.noise)} levels"
            )
        if self.prediction not in get_args(PredictionType):
            raise ValueError(
                f"prediction must be one of {get_args(PredictionType)}, got {self.prediction!r}"
            )

    @classmethod
    def from_ddim(cls, scheduler: DDIMScheduler, steps: int) -> Schedule:
        """`steps` timesteps, spaced and offset as the scheduler's configuration says.

        Raises:
            InputError: The model has fewer timesteps.
        """
        check_steps(steps, scheduler.config.num_train_timesteps)
        scheduler.set_timesteps(steps)
        # diffusers' "trailing" spacing adds a timestep of -1 for some numbers of steps, as 61
        timesteps = tuple(int(t) for t in scheduler.timesteps if t >= 0)
        if timesteps[0] >= scheduler.config.num_train_timesteps:
            raise InputError(
                f"{steps} steps and the scheduler's offset of {scheduler.config.steps_offset} "
                f"reach timestep {timesteps[0]}, past the model's last; take fewer steps"
            )
        alphas = [float(scheduler.alphas_cumprod[t]) for t in timesteps]
        alphas.append(float(scheduler.final_alpha_cumprod))
        return cls(
            timesteps=timesteps,
            signal=tuple(a**0.5 for a in alphas),
            noise=tuple((1 - a) ** 0.5 for a in alphas),
            prediction=scheduler.config.prediction_type,
        )

    @classmethod
    def from_flow(
        cls,
        scheduler: FlowMatchEulerDiscreteScheduler,
        steps: int,
        tokens: int,
        sigmas: Sequence[float] | None = None,
    ) -> Schedule:
        """`steps` noise levels of a flow, shifted towards noise as the configuration says.

        Args:
            scheduler: Of the model.
            steps: Of sampling.
            tokens: Of an image, by which a dynamic shift goes (Esser et al. 2024, arXiv
                2403.03206, section 5.3.2).
            sigmas: The levels before the shift, noisiest first; by default evenly spaced between
                the scheduler's own ends.

        Raises:
            InputError: The model has fewer timesteps.
        """
        config = scheduler.config
        check_steps(steps, config.num_train_timesteps)
        few, many = config.base_image_seq_len, config.max_image_seq_len
        slope = (config.max_shift - config.base_shift) / (many - few)
        mu = config.base_shift + slope * (tokens - few) if config.use_dynamic_shifting else None
        scheduler.set_timesteps(steps, sigmas=sigmas, mu=mu)
        noise = tuple(scheduler.sigmas.tolist())
        signal = tuple(1 - sigma for sigma in noise)
        return cls(tuple(scheduler.timesteps.tolist()), signal, noise, "flow")

    def __len__(self) -> int:
        """The number of steps."""
        return len(self.timesteps)

    def split(self, output: Tensor, x: Tensor, i: int) -> tuple[Tensor, Tensor]:
        """The clean latent x0 and the noise n that a network's output at level i implies for x."""
        signal, noise = self.signal[i], self.noise[i]
        if self.prediction == "flow":
            return x - noise * output, x + signal * output
        n = output if self.prediction == "epsilon" else signal * output + noise * x
        return (x - noise * n) / signal, n

    def mix(self, x0: Tensor, n: Tensor, i: int) -> Tensor:
        """The latent at level i of a clean latent and noise."""
        return self.signal[i] * x0 + self.noise[i] * n

    def step(self, output: Tensor, x: Tensor, i: int) -> Tensor:
        """From level i to i + 1: DDIM with σ = 0 (equation 12), and for flow Euler's step."""
        return self.mix(*self.split(output, x, i), i + 1)

    def leads(self, i: int) -> bool:
        """Whether step i leads to a lower level; the last one of some schedules ends at its own."""
        return self.noise[i] * self.signal[i + 1] > self.noise[i + 1] * self.signal[i]

    def clean(self, x: Tensor, following: Tensor, i: int) -> Tensor:
        """The clean latent on whose way to it a step led from x at level i to `following`."""
        signal, noise = self.signal[i : i + 2], self.noise[i : i + 2]
        return (noise[1] * x - noise[0] * following) / (signal[0] * noise[1] - signal[1] * noise[0])

    def towards(self, x0: Tensor, x: Tensor, i: int) -> Tensor:
        """From x at level i to level i + 1 on the way to a clean latent: undoes `clean`."""
        return self.mix(x0, (x - self.signal[i] * x0) / self.noise[i], i + 1)

    def invert(self, output: Tensor, x: Tensor, i: int) -> Tensor:
        """From level i + 1 back to i, by the network's output for x at timestep i.

        For "v_prediction" the output is that of a network which takes x to be at level i: it
        implies the same noise, and so the same inversion, as "epsilon" would.
        """
        return self.back(self.noise_before(output, x, i), x, i)

    def noise_before(self, output: Tensor, x: Tensor, i: int) -> Tensor:
        """The noise that `invert` takes, of an output for x at level i + 1 and timestep i."""
        _, n = self.split(output, x, i if self.prediction == "v_prediction" else i + 1)
        return n

    def back(self, n: Tensor, x: Tensor, i: int) -> Tensor:
        """From level i + 1 back to i along the noise n: undoes `step`, if n is that at level i."""
        return self.mix((x - self.noise[i + 1] * n) / self.signal[i + 1], n, i)

    def refined(self, grid: Schedule) -> Schedule:
        """The grid's levels, with these in place of the nearest ones that are not on it.

        Raises:
            InputError: The grid has fewer levels.
        """
        if len(grid) < len(self):
            raise InputError(
                f"inversion needs at least as many steps as sampling: got {len(grid)} inversion "
                f"steps for {len(self)} sampling steps; raise inversion_steps or lower steps"
            )
        free = [t for t in grid.timesteps if t not in self.timesteps]
        for wanted in self.timesteps:
            if wanted not in grid.timesteps:
                free.remove(min(free, key=lambda t: abs(t - wanted)))
        levels = {
            t: level
            for schedule in (grid, self)
            for t, *level in zip(schedule.timesteps, schedule.signal, schedule.noise, strict=False)
        }
        chosen = sorted([*self.timesteps, *free], reverse=True)
        signal, noise = zip(*(levels[t] for t in chosen), strict=True)
        return Schedule(
            tuple(chosen),
            (*signal, self.signal[-1]),
            (*noise, self.noise[-1]),
            self.prediction,
        )

    def passed(self, t: Timestep) -> int:
        """How many of the timesteps are noisier than t: the step that t falls into."""
        return sum(other > t for other in self.timesteps)


def check_steps(steps: int, most: int) -> None:
    """Raises an `InputError` for a number of steps that a model does not have."""
    if not 1 <= steps <= most:
        raise InputError(f"expected 1 to {most} steps, got {steps}")


def guide(negative: Tensor, prompt: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (Ho and Salimans 2022); a scale of 1 is the prompt alone."""
    return negative + scale * (prompt - negative)


def require_finite(values: Tensor, where: str) -> None:
    """Raises a `DivergedError` that names `where` when a value is NaN or infinite."""
    if not torch.isfinite(values).all():
        raise DivergedError(
            f"NaN or infinite values in {where}; "
            f"this happens with float16 on some models: try dtype bfloat16 or float32, "
            f"or a lower guidance scale"
        )
