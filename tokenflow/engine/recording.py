"""The source's features: cached by an edit for later ones, or recorded in inversion.

Inversion runs the source through the network at every timestep of sampling. Recorded there, its
correspondences and injected features spare sampling the source's branch from the first edit on.
They differ a little: at the timestep of level i, DDIM inversion asks at the latents of level i + 1,
Uni-Inv at a guess of those of level i, where the source's branch has these; and here all frames
have their own attention, where in the source's branch outputs are propagated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tokenflow.diffusion import Schedule
from tokenflow.diffusion.inversion import inversion_steps
from tokenflow.diffusion.schedule import Timestep, require_finite
from tokenflow.diffusion.trajectory import rows
from tokenflow.engine.algorithm import Consistency
from tokenflow.engine.attention import Matcher
from tokenflow.engine.invert import OnStep, Parts, source_output, timed
from tokenflow.engine.resume import CachedInversion
from tokenflow.engine.sampling import Latents, Sampling
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
    inversion_key: Sequence[Any] = (),
) -> Sampling:
    """With the source's features cached.

    Args:
        sampling: Of this edit.
        way: Of consistency.
        cache: Where they are kept.
        kernel: Its class and options.
        writer: The edit's own name.
        inversion_key: What inversion depends on besides the frames, where it records them.
    """
    network, trajectory, settings = sampling.network, sampling.trajectory, sampling.settings
    shard, steps = sampling.shard, len(sampling.schedule)
    with sampling.ranks.together():
        tensors = {"clean": trajectory.clean}
        if not inversion_key:
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
        *inversion_key,
    )  # fmt: skip
    features = SourceFeatures(
        cache, key, writer, sampling.name, injected, sampling.matcher.wanted, sampling.ranks,
        recorded=bool(inversion_key),
    )  # fmt: skip
    return dataclasses.replace(sampling, features=features)


def recorded(
    sampling: Sampling,
    way: type[Consistency],
    cache: SourceCache | None,
    kernel: object,
    inversion: Schedule,
    missing: Parts,
    cached: CachedInversion,
    seconds: dict[str, float],
    on_step: OnStep,
) -> Sampling:
    """With the source's features, recorded while it is inverted unless all is cached.

    Args:
        sampling: Of this edit, with the trajectory as far as it is cached.
        way: Of consistency.
        cache: Where features are kept; in memory, for this edit alone, if None.
        kernel: Its class and options; None where they are not known.
        inversion: The noise levels of inversion.
        missing: The frames that are to be inverted.
        cached: Where their inversion is kept.
        seconds: Of each stage.
        on_step: Called after every step; may ask to stop.

    Raises:
        DivergedError: A latent became NaN or infinite.
        Preempted: `on_step` asked to stop, on one of the ranks.
    """
    s, matcher = sampling, sampling.matcher
    if cache is None or kernel is None:
        cache = SourceCache()
    # what is looked at does not change what is kept
    s = dataclasses.replace(s, matcher=Matcher(matcher.kernel, matcher.size, matcher.flow))
    key = "recorded", s.settings.inversion_solver, inversion.timesteps
    s = with_features(s, way, cache, kernel, inversion_key=key)
    (lacks,) = s.ranks.any(bool(missing))
    if lacks or not s.features.complete():
        with timed(seconds, "invert"):
            invert_recording(s, way, inversion, missing, cached, on_step)
    show(sampling, way)
    return s


def invert_recording(
    sampling: Sampling,
    way: type[Consistency],
    inversion: Schedule,
    missing: Parts,
    cached: CachedInversion,
    on_step: OnStep,
) -> None:
    """Inverts all of this rank's frames, step by step, and records the source's features.

    In a step a frame goes through the network as in `invert_parts`, but keyframes before the
    others, whose tokens are matched with theirs. What is missing goes to the trajectory.
    """
    s, trajectory, network = sampling, sampling.trajectory, sampling.network
    here = torch.cat([*missing, torch.zeros(0, dtype=torch.long)])

    def predict(frames: list[int], latents: Tensor, t: Timestep) -> Tensor:
        index = trajectory.timesteps.index(t) if t in trajectory.timesteps else None
        if index is None or s.features.injected[index] is None:
            output = batched(s, frames, latents, t)
        else:
            s.features.begin(index, inversion=True)
            output = source_alone(s, way, latents, index)
            s.features.end()
        with s.ranks.together():
            require_finite(output, f"the source's prediction in inversion at timestep {t}")
        return output

    with network.installed():
        solver, frames = s.settings.inversion_solver, list(trajectory.positions)
        levels = inversion_steps(predict, trajectory.clean, frames, inversion, solver)
        for done, (level, x) in enumerate(levels, start=1):
            trajectory.keep(inversion.timesteps[level], here, x[here])
            if level == 0:
                with s.ranks.together():
                    cached.keep(trajectory, here)
            (stop,) = s.ranks.any(on_step("invert", done, len(inversion)) == "stop")
            if stop:
                raise Preempted
    s.features.close()


def batched(sampling: Sampling, frames: list[int], latents: Latents, t: Timestep) -> Latents:
    """The network's output for the source, with nothing recorded."""
    network, parts = sampling.network, sampling.parts(frames)
    each = zip(parts, latents.split(sampling.settings.batch), strict=True)
    found = [
        source_output(network, sampling.schedule, list(part), x.to(network.model.device), t).cpu()
        for part, x in each
    ]
    return torch.cat(found)


def source_alone(
    sampling: Sampling, way: type[Consistency], latents: Latents, index: int
) -> Latents:
    """The network's output for the source at a step of sampling, by its passes of the source alone.

    Each frame has its own attention, as in inversion.
    """
    # nothing is predicted that could be fused
    s = dataclasses.replace(sampling, settings=dataclasses.replace(sampling.settings, fusion=0.0))
    step = dataclasses.replace(s.step(index), branches=s.network.branches[:1], guidance=1.0)
    output = torch.empty_like(latents)
    arriving = [
        (frames, outputs[0].to("cpu", non_blocking=True))
        for frames, outputs in way(s).outputs(latents, step)
    ]
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    for frames, arrived in arriving:
        output[rows(s.trajectory.positions, frames)] = arrived.to(output)
    return output


def show(sampling: Sampling, way: type[Consistency]) -> None:
    """Matches the source's tokens at its own latents, in the steps that are wanted.

    Sampling, which runs without the source, has none to show.
    """
    with sampling.network.installed():
        for index in range(len(sampling.schedule)):
            (wanted,) = sampling.ranks.any(sampling.matcher.wanted(index))
            if wanted:
                source_alone(sampling, way, sampling.trajectory.at(index), index)
