"""Fusion of predictions at one step: keyframes vote, and frames take a share of their result."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tokenflow.diffusion.trajectory import rows
from tokenflow.editors import Step
from tokenflow.engine.joint_passes import overlap
from tokenflow.engine.keyframes import both_sides, leading, neighbourhood, spans
from tokenflow.engine.sampling import Latents, Outputs, Sampling
from tokenflow.propagation.clip_flow import with_inconsistency
from tokenflow.propagation.flow.base import warp
from tokenflow.propagation.flow.surroundings import continued
from tokenflow.propagation.fusion import elected, fuse

RESTORED = 0.7
"""Share of their lost strength that details are given back (docs/benchmark.md)."""


def fused_latents(
    sampling: Sampling,
    x: Latents,
    following: Latents,
    keyframes: Sequence[int],
    outputs: Outputs,
    step: Step,
) -> Latents:
    """The latents after a step whose predicted clean latents are fused.

    Args:
        sampling: Of this rank's frames.
        x: Their latents before the step.
        following: What the editor advanced these to.
        keyframes: Of all windows, by position in the clip.
        outputs: Of this rank's keyframes in the joint pass, in host memory.
        step: Of sampling.
    """
    s, schedule, here = sampling, step.schedule, sampling.trajectory.positions
    share = s.settings.fusion_at(step.index, len(schedule))
    assert s.flow is not None, "edit_clip and edit_latents ask for it"
    own = [keyframes[number] for number in s.shard.own]
    before = x[rows(here, own)]
    # a step leads from x towards a clean latent, unless x themselves are clean ones
    already = not s.network.editor.inverts
    if already and not s.network.editor.clean_after(step):
        return following  # nor from clean latents
    if not (already or schedule.leads(step.index)):
        return following
    keys = s.advanced(before, own, outputs, step)
    if not already:
        keys = schedule.clean(before, keys, step.index)
    held = slice(s.shard.halo.start, s.shard.halo.stop)
    windows, positions = s.shard.windows[held], keyframes[held]
    source = s.trajectory.source(own).clean
    source_keys = exchanged(s, source)
    keys = voted(s, keys, source, keyframes, step.index)
    # then every other keyframe takes what one beside it predicts, so that all come to agree
    pairs = s.flow.moved(leading(keyframes, s.shard.own, s.shard.halo, step.index))
    all_keys = exchanged(s, keys)
    keys = exchanged(s, fuse(keys, all_keys, source, source_keys, pairs, 1.0, RESTORED))
    result = torch.empty_like(x)
    for part in s.parts(here):
        window, used = neighbourhood(
            part, windows, positions, s.settings.neighbours, s.settings.blend
        )
        some = rows(here, part)
        clean = following[some]
        if not already:
            clean = schedule.clean(x[some], clean, step.index)
        clean = fuse(
            clean, keys[used], s.trajectory.source(part).clean, source_keys[used],
            s.flow.moved(window), share, RESTORED,
        )  # fmt: skip
        result[some] = clean if already else schedule.towards(clean, x[some], step.index)
    return result


def voted(
    sampling: Sampling,
    own: Float[Tensor, "own c h w"],
    source: Float[Tensor, "own d h w"],
    keyframes: Sequence[int],
    step: int,
) -> Float[Tensor, "own c h w"]:
    """What this rank's keyframes predict, after those of a span have voted on it.

    Of fewer than three there is no majority, and nothing changes.

    Args:
        sampling: Of this rank's frames.
        own: What its keyframes predict.
        source: The source's clean latents of these.
        keyframes: Of all windows, by position in the clip.
        step: Of sampling, from 0.
    """
    s, total = sampling, len(keyframes)
    assert s.flow is not None, "edit_clip and edit_latents ask for it"
    if total < 3:
        return own
    with s.ranks.together():
        motion = s.flow.moved(both_sides(keyframes, s.shard.own, s.shard.halo)).motion
    assert motion is not None, "moved finds it"
    hops = motion.displacement.movedim(-1, 2).flatten(1, 2).unflatten(-1, own.shape[-2:])
    every = s.ranks.all_gather(torch.cat([own, source, hops], dim=1), s.shard.counts, host=True)
    keys, seen, hops = every.split([own.shape[1], source.shape[1], 4], dim=1)
    hops, result = hops.unflatten(1, (2, 2)), own.clone()
    for windows, among in spans(total, s.settings.span, 0, step):
        voters, asked = list(among), overlap(windows, s.shard.own)
        if len(voters) < 3 or not asked:
            continue
        to = {k: chained(hops, k, voters) for k in voters}
        for number in asked:
            place = voters.index(number)
            flows = torch.stack([
                continued(seen[number], seen[k], with_inconsistency(there, to[k][place]))
                for k, there in zip(voters, to[number], strict=True)
            ])  # fmt: skip
            result[s.shard.own.index(number)] = elected(
                keys[voters], seen[voters], flows, place, RESTORED
            )
    return result


def chained(
    hops: Float[Tensor, "keyframes 2 2 h w"], number: int, voters: Sequence[int]
) -> Float[Tensor, "voters 2 h w"]:
    """Flow from one keyframe to each of consecutive ones, by hops to the one before and after."""
    flows = {number: torch.zeros_like(hops[number, 0])}
    for at in range(number, voters[0], -1):
        flows[at - 1] = flows[at] + warp(hops[at, 0], flows[at])
    for at in range(number, voters[-1]):
        flows[at + 1] = flows[at] + warp(hops[at, 1], flows[at])
    return torch.stack([flows[voter] for voter in voters])


def exchanged(sampling: Sampling, own: Float[Tensor, "own c h w"]) -> Float[Tensor, "held c h w"]:
    """Latents of this rank's keyframes, and of one more at each side."""
    return sampling.ranks.exchange_halo(own, sampling.shard.counts, host=True)
