"""Which keyframes a rank denoises together, and for which windows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from torch import Tensor

from tokenflow.editors import Step
from tokenflow.engine.keyframes import spans
from tokenflow.engine.sampling import Latents, Outputs, Sampling


class JointPass(NamedTuple):
    """Keyframes that go through the network together, and the windows propagated from them.

    Attributes:
        frames: The keyframes, by their positions in the clip.
        inputs: Theirs, of all branches.
        windows: Numbers of the windows whose frames take their features from the pass.
        held: Numbers of the windows whose keyframes the bank has.
        all_gather: From the keys and values of `frames` to those of all keyframes of the pass.
        exchange_halo: From the tokens of `frames` to those of `held`.
    """

    frames: list[int]
    inputs: Outputs
    windows: range
    held: range
    all_gather: Callable[[Tensor], Tensor]
    exchange_halo: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Kept:
    """Chooses keyframes of a pass, in a row: for a list an accelerator would be waited for."""

    numbers: slice

    def __call__(self, items: Tensor) -> Tensor:
        return items[self.numbers]


def joint_passes(
    sampling: Sampling, x: Latents, keyframes: Sequence[int], step: Step
) -> Iterator[JointPass]:
    """One pass of all keyframes, or one per span of windows where attention is windowed.

    With full attention each rank denoises its own keyframes, with the keys and values of all.
    With spans the keyframes' inputs are all-gathered, and a rank denoises those that its
    windows need, so that nothing on the device grows with the clip.
    """
    s, shard = sampling, sampling.shard
    own = [keyframes[number] for number in shard.own]
    inputs = s.inputs(x, own, step)
    if s.settings.keyframe_attention == "full":
        all_gather = partial(s.ranks.all_gather, counts=shard.counts)
        exchange_halo = partial(s.ranks.exchange_halo, counts=shard.counts)
        yield JointPass(own, inputs, shard.own, shard.halo, all_gather, exchange_halo)
        return
    every = s.ranks.all_gather(inputs.transpose(0, 1), shard.counts, host=True).transpose(0, 1)
    windows = spans(len(shard.windows), s.settings.span, s.settings.anchors, step.index)
    for numbers, seen in windows:
        mine = overlap(numbers, shard.own)
        held = overlap(range(mine.start - 1, mine.stop + 1), shard.halo)
        if mine:
            frames = [keyframes[number] for number in seen]
            first = seen.index(held.start)
            kept = Kept(slice(first, first + len(held)))
            yield JointPass(frames, every[:, list(seen)], mine, held, lambda own: own, kept)


def overlap(a: range, b: range) -> range:
    """What two runs of numbers have in common."""
    return range(max(a.start, b.start), min(a.stop, b.stop))
