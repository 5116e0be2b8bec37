"""Inversion: the noise trajectory of a clip's frames, by DDIM (Song et al. 2021, arXiv 2010.02502).

DDIM asks the network at the latent before a step with the timestep after it, and sampling does not
lead back to where inversion came from by the difference. Uni-Inv (Jiao et al. 2025, arXiv
2504.13109) takes the step first with the noise of the step before, asks there, and takes it again:
for as many evaluations the round trip is of second order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tokenflow.diffusion.backbone import Backbone
from tokenflow.diffusion.schedule import Schedule, Timestep, require_finite
from tokenflow.diffusion.trajectory import Trajectory

Predict = Callable[[list[int], Tensor, Timestep], Tensor]
"""The network's output for the source: of frames by position, latents, and the timestep."""
InversionSolver = Literal["ddim", "uni-inv"]


def source_prediction(backbone: Backbone, prompt: str) -> Predict:
    """The model's output for what the source shows, without guidance or an editor."""
    embedding = backbone.embed([prompt])

    def predict(frames: list[int], latents: Tensor, t: Timestep) -> Tensor:
        return backbone.predict(latents, t, embedding.per_frame(len(frames)))

    return predict


@torch.no_grad()
def inversion_steps(
    predict: Predict,
    latents: Float[Tensor, "frames c h w"],
    frames: list[int],
    schedule: Schedule,
    solver: InversionSolver = "ddim",
) -> Iterator[tuple[int, Float[Tensor, "frames c h w"]]]:
    """The level and the latents of one batch of frames after each step, least noisy first.

    The network is given the timestep of level i, and by "ddim" the latent at level i + 1, by
    "uni-inv" the one at level i that the noise of the step before leads to.

    Args:
        predict: The network's output for the source.
        latents: The frames' clean latents, on the model's device.
        frames: Their positions in the clip.
        schedule: Of inversion, `Schedule.refined`.
        solver: Where the network is asked.

    Raises:
        DivergedError: A latent became NaN or infinite.
    """
    x, n = latents, None
    for i in reversed(range(len(schedule))):
        t = schedule.timesteps[i]
        if n is None or solver == "ddim":
            n = schedule.noise_before(predict(frames, x, t), x, i)
        else:
            guess = schedule.back(n, x, i)
            _, n = schedule.split(predict(frames, guess, t), guess, i)
        x = schedule.back(n, x, i)
        require_finite(x, f"inversion at step {len(schedule) - 1 - i} (timestep {t})")
        yield i, x


@torch.no_grad()
def invert(
    backbone: Backbone,
    latents: Float[Tensor, "frames c h w"],
    prompt: str,
    schedule: Schedule,
    steps: int,
    batch: int = 8,
    progress: Callable[[], None] = lambda: None,
    solver: InversionSolver = "ddim",
) -> Trajectory:
    """Inverts clean latents, one batch of frames after the other.

    Args:
        backbone: The frozen model.
        latents: The frames' clean latents.
        prompt: What the source shows; may be empty.
        schedule: Sampling's schedule, whose levels are kept.
        steps: How many steps to take, at least as many as sampling.
        batch: Frames in one forward pass.
        progress: Called after every step of every batch.
        solver: Where the network is asked.

    Raises:
        InputError: There are fewer steps than sampling takes, or more than the model has.
        DivergedError: A latent became NaN or infinite.
    """
    height, width = latents.shape[-2:]
    inversion = schedule.refined(backbone.schedule(steps, (height, width)))
    trajectory = Trajectory.empty(latents, schedule, inversion)
    predict = source_prediction(backbone, prompt)
    for part in torch.arange(len(latents)).split(batch):
        here = latents[part].to(backbone.device)
        for i, x in inversion_steps(predict, here, part.tolist(), inversion, solver):
            trajectory.keep(inversion.timesteps[i], part, x)
            progress()
    return trajectory


@torch.no_grad()
def reconstruct(
    backbone: Backbone,
    predict: Predict,
    trajectory: Trajectory,
    schedule: Schedule,
    batch: int = 8,
    progress: Callable[[int], None] = lambda done: None,
) -> Float[Tensor, "frames c h w"]:
    """Samples a trajectory's first latents back without an edit or guidance, by `predict`.

    Raises:
        DivergedError: A latent became NaN or infinite.
    """
    x = trajectory.at(0).clone()
    for i, t in enumerate(schedule.timesteps):
        for part in torch.arange(len(x)).split(batch):
            here = x[part].to(backbone.device)
            output = predict((part + trajectory.first).tolist(), here, t)
            x[part] = schedule.step(output, here, i).to(x)
        require_finite(x, f"reconstruction at step {i} (timestep {t})")
        progress(i + 1)
    return x
