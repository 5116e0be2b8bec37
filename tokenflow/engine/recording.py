"""The source's features: cached by an edit for later ones, or recorded in inversion.

Inversion runs the source through the network at every timestep of sampling. Recorded there, its
correspondences and injected features spare sampling the source's branch from the first edit on.
They differ a little: inversion asks the network where a step begins, sampling where it ends; and
all frames have their own attention, where the source's branch has propagated outputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tokenflow.diffusion import Schedule
from tokenflow.diffusion.inversion import InversionSolver, inversion_steps
from tokenflow.diffusion.schedule import Timestep
from tokenflow.diffusion.trajectory import rows
from tokenflow.engine.algorithm import Consistency
from tokenflow.engine.invert import OnStep, source_output
from tokenflow.engine.sampling import Sampling
from tokenflow.engine.source_cache import SourceCache, SourceFeatures
from tokenflow.errors import Preempted
from tokenflow.storage import digests

SOURCE_SETTINGS = (
    "keyframe_every", "keyframes", "neighbours", "blend", "keyframe_attention", "span", "anchors",
    "seed",
)  # fmt: skip
"""Settings that the source's features depend on."""


def uses_features(sampling: Sampling, way: type[Consistency]) -> bool:
    """Whether the edit takes from the source's branch nothing but what may be kept."""
    return way.uses_features and not sampling.network.editor.needs_source


def with_features(
    sampling: Sampling,
    way: type[Consistency],
    cache: SourceCache,
    kernel: object,
    writer: str = "",
    recorded: Sequence[Any] = (),
) -> Sampling:
    """With the source's features cached.

    Args:
        sampling: Of this edit.
        way: Of consistency.
        cache: Where they are kept.
        kernel: Its class and options.
        writer: The edit's own name.
        recorded: Where they are recorded in inversion, what that depends on besides the frames.
    """
    network, trajectory, settings = sampling.network, sampling.trajectory, sampling.settings
    shard, steps = sampling.shard, len(sampling.schedule)
    with sampling.ranks.together():
        tensors = {"clean": trajectory.clean}
        if not recorded:
            tensors["noisiest"] = trajectory.noisiest
        if network.channels is not None:
            tensors["channels"] = network.channels
        own = digests.of_tensors(tensors)
        injected = [network.injected(step, steps) for step in range(steps)]
    chosen = {name: getattr(settings, name) for name in SOURCE_SETTINGS}
    key = (
        network.model.fingerprint, network.matched, network.source_prompt,
        sampling.schedule.timesteps, chosen,
        sampling.name, kernel, sampling.matcher.kernel.cache_key(), sampling.keyframes_once,
        list(shard.own), shard.counts,
        way.__module__, way.__qualname__, way.cache_key(), sampling.ranks.all_gather_object(own),
        *recorded,
    )  # fmt: skip
    features = SourceFeatures(
        cache, key, writer, sampling.name, injected, sampling.matcher.wanted, sampling.ranks,
        recorded=bool(recorded),
    )  # fmt: skip
    return dataclasses.replace(sampling, features=features)


def invert_recording(
    sampling: Sampling,
    way: type[Consistency],
    inversion: Schedule,
    solver: InversionSolver,
    on_step: OnStep,
) -> None:
    """Inverts all of this rank's frames step by step, and records the source's features.

    Each frame goes through the network once in a step, as in `invert_parts`, but the keyframes
    before the others, whose tokens are matched with theirs.

    Raises:
        DivergedError: A latent became NaN or infinite.
        Preempted: `on_step` asked to stop, on one of the ranks.
    """
    s, trajectory, network = sampling, sampling.trajectory, sampling.network
    consistency, timesteps = way(sampling), trajectory.timesteps
    everything, device = torch.arange(len(trajectory)), network.model.device

    def predict(frames: list[int], latents: Tensor, t: Timestep) -> Tensor:
        if t not in timesteps:  # inversion has more steps than sampling
            plain = partial(source_output, network, s.schedule, t=t)
            parts = zip(s.parts(frames), latents.split(s.settings.batch), strict=True)
            return torch.cat([plain(list(part), x.to(device)).cpu() for part, x in parts])
        index = timesteps.index(t)
        step = dataclasses.replace(s.step(index), branches=network.branches[:1], guidance=1.0)
        output = torch.empty_like(latents)
        s.features.begin(index, inversion=True)
        for some, outputs in consistency.outputs(latents, step):
            output[rows(trajectory.positions, some)] = outputs[0].to(output)
        s.features.end()
        s.require_finite(output, step)
        return output

    with network.installed():
        levels = inversion_steps(
            predict, trajectory.clean, list(trajectory.positions), inversion, solver
        )
        for done, (level, x) in enumerate(levels, start=1):
            trajectory.keep(inversion.timesteps[level], everything, x)
            (stop,) = s.ranks.any(on_step("invert", done, len(inversion)) == "stop")
            if stop:
                raise Preempted
    s.features.close()
