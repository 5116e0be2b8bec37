"""The joint passes over keyframes of one step, as one rank does them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter

from jaxtyping import Float
from torch import Tensor

from tokenflow.engine.ranks.group import FrameGroup
from tokenflow.engine.ranks.shard import Share
from tokenflow.engine.spans import Span

Latents = Callable[[Sequence[int]], Float[Tensor, "frames 2 c h w"]]
"""Of frames that this rank has: the source's, and the edit's."""


@dataclass(frozen=True)
class JointPass:
    """Keyframes that go through the UNet together, and the windows that are propagated from them.

    Attributes:
        frames: The keyframes, by their positions in the clip.
        latents: Theirs, of source and edit, in host memory.
        windows: Numbers of the windows whose frames take their features from the pass.
        held: Numbers of the windows whose keyframes the bank has.
        gather: Gives what all of the pass's keyframes have, for what those of `frames` have.
        keep: Gives what those of `held` have, for the same.
    """

    frames: list[int]
    latents: Float[Tensor, "keyframes 2 c h w"]
    windows: range
    held: range
    gather: Callable[[Tensor], Tensor]
    keep: Callable[[Tensor], Tensor]


def full(
    keyframes: Sequence[int], latents: Latents, group: FrameGroup, share: Share
) -> list[JointPass]:
    """One pass of all keyframes, of which each rank takes its own and hears of all others."""
    own = [keyframes[number] for number in share.own]
    gather, with_neighbours = (
        partial(exchange, counts=share.counts) for exchange in (group.gather, group.with_neighbours)
    )
    return [JointPass(own, latents(own), share.own, share.held, gather, with_neighbours)]


def windowed(
    keyframes: Sequence[int],
    latents: Latents,
    group: FrameGroup,
    share: Share,
    spans: Iterable[Span],
) -> list[JointPass]:
    """A pass for each span that has windows of this rank's; a span of two ranks is done by both.

    What ranks tell each other is all told when this returns: the keyframes' latents.
    """
    own = latents([keyframes[number] for number in share.own])
    every = group.gather(own, share.counts, host=True)
    passes = []
    for windows, seen in spans:
        mine = overlap(windows, share.own)
        held = overlap(range(mine.start - 1, mine.stop + 1), share.held)
        if mine:
            kept = [seen.index(number) for number in held]
            joint = JointPass(
                [keyframes[number] for number in seen], every[list(seen)], mine, held,
                gather=lambda items: items, keep=itemgetter(kept),
            )  # fmt: skip
            passes.append(joint)
    return passes


def overlap(a: range, b: range) -> range:
    """What two runs of numbers have in common."""
    return range(max(a.start, b.start), min(a.stop, b.stop))
