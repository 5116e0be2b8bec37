"""DDIM inversion: the noise trajectory of a clip's frames."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tokenflow.diffusion.backbone import Backbone
from tokenflow.diffusion.sampling import Schedule, ddim_step, require_finite
from tokenflow.diffusion.trajectory import Trajectory
from tokenflow.errors import InputError

Noise = Callable[[list[int], Tensor, int], Tensor]
"""ε of frames, by their positions in the clip, their latents and the timestep."""


def inversion_timesteps(steps: int, sampling: Schedule, backbone: Backbone) -> tuple[int, ...]:
    """`steps` timesteps, least noisy first, that include all those of sampling.

    They are the scheduler's own grid; where a sampling timestep is not on it, the nearest grid
    point that is free moves there.
    """
    if steps > (most := backbone.scheduler.config.num_train_timesteps):
        raise InputError(f"expected inversion_steps of at most {most} for this model, got {steps}")
    if steps < len(sampling.timesteps):
        raise InputError(
            f"inversion needs at least as many steps as sampling: got {steps} inversion steps for "
            f"{len(sampling.timesteps)} sampling steps; raise inversion_steps or lower steps"
        )
    grid = backbone.schedule(steps).timesteps
    free = [t for t in grid if t not in sampling.timesteps]
    for wanted in sampling.timesteps:
        if wanted not in grid:
            free.remove(min(free, key=lambda t: abs(t - wanted)))
    return tuple(sorted([*sampling.timesteps, *free]))


def source_noise(backbone: Backbone, prompt: str, schedule: Schedule) -> Noise:
    """The model's noise of what the source shows, without guidance or an editor."""
    embedding = backbone.embed([prompt])

    def noise(frames: list[int], latents: Tensor, t: int) -> Tensor:
        return backbone.epsilon(latents, t, embedding.expand(len(frames), -1, -1), schedule)

    return noise


@torch.no_grad()
def inversion_steps(
    noise: Noise,
    latents: Float[Tensor, "frames c h w"],
    frames: list[int],
    schedule: Schedule,
    timesteps: Sequence[int],
) -> Iterator[Float[Tensor, "frames c h w"]]:
    """The latents of one forward pass's frames after each step; ε at (x, t) moves x on to t.

    Args:
        noise: Of the source.
        latents: The frames' scaled latents, on the model's device.
        frames: Their positions in the clip.
        schedule: The noise schedule.
        timesteps: As of `inversion_timesteps`.

    Raises:
        DivergedError: A latent became NaN or infinite.
    """
    x, before = latents, None
    for step, t in enumerate(timesteps):
        x = ddim_step(x, noise(frames, x, t), schedule.alpha(before), schedule.alpha(t))
        require_finite(x, f"inversion at step {step} (timestep {t})")
        before = t
        yield x


@torch.no_grad()
def invert(
    backbone: Backbone,
    latents: Float[Tensor, "frames c h w"],
    prompt: str,
    schedule: Schedule,
    steps: int,
    batch: int = 8,
    progress: Callable[[], None] = lambda: None,
) -> Trajectory:
    """Walks clean latents up to noise, one batch of frames after the other.

    Args:
        backbone: The frozen model.
        latents: The frames' scaled latents.
        prompt: What the source shows; may be empty.
        schedule: Sampling's schedule, whose timesteps are kept.
        steps: How many steps to take, at least as many as sampling.
        batch: Frames in one forward pass.
        progress: Called after every step of every batch.

    Raises:
        InputError: There are fewer steps than sampling takes, or more than the model has.
        DivergedError: A latent became NaN or infinite.
    """
    timesteps = inversion_timesteps(steps, schedule, backbone)
    trajectory = Trajectory.empty(latents, schedule, timesteps)
    noise = source_noise(backbone, prompt, schedule)
    for part in torch.arange(len(latents)).split(batch):
        here = latents[part].to(backbone.device)
        walk = inversion_steps(noise, here, part.tolist(), schedule, timesteps)
        for t, x in zip(timesteps, walk, strict=True):
            trajectory.keep(t, part, x)
            progress()
    return trajectory


@torch.no_grad()
def reconstruct(
    backbone: Backbone,
    noise: Noise,
    trajectory: Trajectory,
    schedule: Schedule,
    batch: int = 8,
    progress: Callable[[], None] = lambda: None,
) -> Float[Tensor, "frames c h w"]:
    """Samples a trajectory's first latents back without an edit or guidance, by the same `noise`.

    Raises:
        DivergedError: A latent became NaN or infinite.
    """
    x = trajectory.at(schedule.timesteps[0]).clone()
    for t in schedule.timesteps:
        a, a_next = schedule.alpha(t), schedule.alpha(schedule.following(t))
        for part in torch.arange(len(x)).split(batch):
            here = x[part].to(backbone.device)
            epsilon = noise((part + trajectory.first).tolist(), here, t)
            x[part] = ddim_step(here, epsilon, a, a_next).to(x)
        require_finite(x, f"reconstruction at timestep {t}")
        progress()
    return x
