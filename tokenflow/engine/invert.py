"""From a clip's frames to their noise trajectory, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from time import perf_counter
from typing import Literal

import torch
from torch import Tensor

from tokenflow.diffusion import Backbone, Schedule, Trajectory
from tokenflow.diffusion.inversion import InversionSolver, inversion_steps
from tokenflow.diffusion.schedule import Timestep, require_finite
from tokenflow.engine.network import EditedNetwork
from tokenflow.engine.resume import CachedInversion, ResumeStore
from tokenflow.errors import InputError, Preempted
from tokenflow.video import Clip

OnStep = Callable[[str, int, int], Literal["stop"] | None]
"""Called after every step as (stage, steps done, steps), with the stages encode, cached, invert,
mask, reconstruct, edit and decode; "stop" ends the edit where it can be resumed: `Preempted`."""


def ignore(stage: str, step: int, steps: int) -> None:
    """The `OnStep` that does nothing."""


def reported(on_step: OnStep, stage: str, step: int, steps: int) -> None:
    """Reports a step; raises `Preempted` where the answer is "stop"."""
    if on_step(stage, step, steps) == "stop":
        raise Preempted


def check_size(model: Backbone, clip: Clip) -> None:
    """Raises `InputError` for frames whose sides do not fit the model."""
    height, width = clip.frames.shape[-2:]
    if height % model.multiple or width % model.multiple:
        raise InputError(
            f"the frames are {height}x{width}, expected multiples of {model.multiple} for this "
            f"model; read them with read_clip(..., multiple={model.multiple})"
        )
    if model.largest is not None and max(height, width) > model.largest:
        raise InputError(
            f"the frames are {height}x{width}, expected sides of at most {model.largest} for this "
            f"model; read them at a lower resolution"
        )


Parts = list[Tensor]
"""Numbers of the frames of each forward pass, from this rank's first."""


def encode_clip(
    model: Backbone,
    clip: Clip,
    schedule: Schedule,
    inversion: Schedule | None,
    batch: int,
    cached: CachedInversion,
    seconds: dict[str, float],
    on_step: OnStep,
) -> tuple[Trajectory, Parts]:
    """This rank's trajectory as far as it is cached, and the frames to invert, encoded.

    Without an `inversion` schedule nothing is looked up.
    """
    height, width = (side // model.latent_scale for side in clip.frames.shape[-2:])
    clean = torch.empty(len(clip), model.latent_channels, height, width)
    trajectory = Trajectory.empty(clean, schedule, inversion, clip.first, clip.total)
    parts = list(torch.arange(len(clip)).split(batch))
    missing = [part for part in parts if inversion is None or not cached.fill(trajectory, part)]
    if found := len(parts) - len(missing):
        reported(on_step, "cached", found, len(parts))
    for number, part in enumerate(missing, start=1):
        with timed(seconds, "encode"):
            clean[part] = model.encode(clip.frames[part]).cpu()
            require_finite(clean[part], "the encoded frames")
        reported(on_step, "encode", number, len(missing))
    return trajectory, missing


def invert_parts(
    network: EditedNetwork,
    trajectory: Trajectory,
    parts: Parts,
    schedule: Schedule,
    inversion: Schedule,
    solver: InversionSolver,
    cached: CachedInversion,
    seconds: dict[str, float],
    on_step: OnStep,
) -> None:
    """Inverts some of this rank's frames, batch by batch."""
    predict, done = partial(source_output, network, schedule), 0
    for part in parts:
        frames = (part + trajectory.first).tolist()
        clean = trajectory.clean[part].to(network.model.device)
        with timed(seconds, "invert"):
            for level, x in inversion_steps(predict, clean, frames, inversion, solver):
                trajectory.keep(inversion.timesteps[level], part, x)
                if level == 0:
                    cached.keep(trajectory, part)
                done += 1
                reported(on_step, "invert", done, len(parts) * len(inversion))


def source_output(
    network: EditedNetwork, schedule: Schedule, frames: list[int], latents: Tensor, t: Timestep
) -> Tensor:
    """The network's output for the source alone, under the editor's conditioning."""
    return network.run(network.source_batch(schedule, frames, latents, t))[0]


def cached_inversion(
    network: EditedNetwork,
    clip: Clip,
    schedule: Schedule,
    inversion: Schedule | None,
    solver: InversionSolver,
    store: ResumeStore | None,
    given: Sequence[str] = (),
) -> CachedInversion:
    """The clip's entries in the cache; an editor that conditions the source is part of the key.

    The editor must have been prepared for the clip; `given` are digests of what the model is given
    beside each frame's latents.
    """
    editor, conditioned = network.editor, network.editor.conditions_source
    if store is None or (conditioned and store.editor is None):
        return CachedInversion(None, clip)
    content = list(map(editor.cache_key, clip.positions))
    plugin = store.editor if conditioned else None
    steps = () if inversion is None else inversion.timesteps
    prompt, fingerprint = network.source_prompt, network.model.fingerprint
    parts = fingerprint, prompt, schedule.timesteps, steps, solver, plugin
    return CachedInversion(store.cache, clip, parts, content, conditioned, given)


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Adds how long a block took to a stage's time."""
    begin = perf_counter()
    yield
    seconds[stage] = round(seconds.get(stage, 0.0) + perf_counter() - begin, 3)
