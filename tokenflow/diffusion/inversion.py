"""DDIM inversion: the noise trajectory of a clip's frames."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tokenflow.diffusion.backbone import Backbone
from tokenflow.diffusion.sampling import Schedule, ddim_step, require_finite
from tokenflow.diffusion.trajectory import Trajectory
from tokenflow.errors import InputError

Conditioning = Callable[[list[int], Tensor, int], dict[str, Any]]


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


@torch.no_grad()
def invert(
    backbone: Backbone,
    latents: Float[Tensor, "frames c h w"],
    prompt: str,
    schedule: Schedule,
    steps: int,
    batch: int = 8,
    progress: Callable[[], None] = lambda: None,
    conditioning: Conditioning = lambda frames, latents, t: {},
    first: int = 0,
    whole: int | None = None,
) -> Trajectory:
    """Walks clean latents up to noise; ε at (x, t) moves x from the timestep before t to t.

    Args:
        backbone: The frozen model.
        latents: The frames' scaled latents.
        prompt: What the source shows; may be empty.
        schedule: Sampling's schedule, whose timesteps are kept.
        steps: How many steps to take, at least as many as sampling.
        batch: Frames in one forward pass.
        progress: Called after every step.
        conditioning: Further arguments of the UNet, from a pass's frames, latents and timestep.
        first: Where the frames begin in the clip, of which these may be a part.
        whole: How many frames the clip has; as many as there are latents when not given.

    Raises:
        InputError: There are fewer steps than sampling takes, or more than the model has.
        DivergedError: A latent became NaN or infinite.
    """
    timesteps = inversion_timesteps(steps, schedule, backbone)
    embedding = backbone.embed([prompt])
    kept: dict[int, Tensor] = {}
    x, before = latents.clone(), None
    for step, t in enumerate(timesteps):
        a_before, a = schedule.alpha(before), schedule.alpha(t)
        for part in torch.arange(len(x)).split(batch):
            here = x[part].to(backbone.device)
            extra = conditioning((part + first).tolist(), here, t)
            embeddings = embedding.expand(len(part), -1, -1)
            epsilon = backbone.epsilon(here, t, embeddings, schedule, **extra)
            x[part] = ddim_step(here, epsilon, a_before, a).to(x)
        require_finite(x, f"inversion at step {step} (timestep {t})")
        before = t
        if t in schedule.timesteps:
            kept[t] = x.clone()
        progress()
    return Trajectory(
        timesteps=schedule.timesteps,
        latents=torch.stack([kept[t] for t in schedule.timesteps]),
        clean=latents,
        noisiest=x,
        noisiest_alpha=schedule.alpha(timesteps[-1]),
        first=first,
        whole=whole,
    )


@torch.no_grad()
def reconstruct(
    backbone: Backbone,
    trajectory: Trajectory,
    prompt: str,
    schedule: Schedule,
    batch: int = 8,
    progress: Callable[[], None] = lambda: None,
    conditioning: Conditioning = lambda frames, latents, t: {},
) -> Float[Tensor, "frames c h w"]:
    """Samples a trajectory's first latents back without an edit or guidance.

    Raises:
        DivergedError: A latent became NaN or infinite.
    """
    embedding = backbone.embed([prompt])
    x = trajectory.at(schedule.timesteps[0]).clone()
    for t in schedule.timesteps:
        a, a_next = schedule.alpha(t), schedule.alpha(schedule.following(t))
        for part in torch.arange(len(x)).split(batch):
            here = x[part].to(backbone.device)
            extra = conditioning((part + trajectory.first).tolist(), here, t)
            embeddings = embedding.expand(len(part), -1, -1)
            epsilon = backbone.epsilon(here, t, embeddings, schedule, **extra)
            x[part] = ddim_step(here, epsilon, a, a_next).to(x)
        require_finite(x, f"reconstruction at timestep {t}")
        progress()
    return x
