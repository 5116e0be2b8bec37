"""Algorithm 1 of the paper: the ways of consistency, one step each, and the sampling loop.

Read beside Geyer et al. 2023 (arXiv 2307.10373). x are the edited latents of all frames that this
rank has, in host memory; every network batch is branches × frames, the source branch first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from tokenflow.diffusion import Schedule, Trajectory
from tokenflow.diffusion.schedule import require_finite
from tokenflow.diffusion.trajectory import rows
from tokenflow.editors import Step
from tokenflow.engine.attention import Bank, JointAttention, Matcher, PropagatedAttention
from tokenflow.engine.keyframes import draw_keyframes, neighbourhood, spans
from tokenflow.engine.network import EditedNetwork
from tokenflow.engine.ranks.group import FrameGroup
from tokenflow.engine.ranks.shard import WindowShard
from tokenflow.engine.settings import Settings
from tokenflow.errors import Preempted

Latents = Float[Tensor, "own c h w"]
Outputs = Float[Tensor, "branches frames c h w"]
AfterStep = Callable[[int, Latents], bool]
"""Called with the number of steps done and the latents; whether to stop."""


@dataclass(frozen=True)
class Sampling:
    """What one clip is sampled with; of a clip that ranks share, this rank's part.

    Attributes:
        network: The frozen network under the editor.
        trajectory: The source's latents.
        schedule: Sampling's noise levels.
        matcher: The kernel that finds correspondences.
        settings: How the clip is edited.
        name: The clip's: keyframes are drawn by it.
        shard: The clip's windows, and which of them this rank has.
        ranks: Who share the clip.
    """

    network: EditedNetwork
    trajectory: Trajectory
    schedule: Schedule
    matcher: Matcher
    settings: Settings
    name: str
    shard: WindowShard
    ranks: FrameGroup

    def step(self, index: int) -> Step:
        """A step of sampling, as the editor sees it."""
        s = self.settings
        assert s.guidance is not None, "Settings.for_model comes before"
        return Step(index, self.schedule, s.guidance, s.seed, self.network.branches)

    def inputs(self, x: Latents, frames: Sequence[int], step: Step) -> Outputs:
        """The network's inputs for some of this rank's frames, by position in the clip."""
        here = x[rows(self.trajectory.positions, frames)]
        return self.network.editor.inputs(here, step, self.trajectory.source(frames))

    def parts(self, frames: range) -> list[range]:
        """Runs of frames for one forward pass each."""
        batch = self.settings.batch
        return [frames[i : i + batch] for i in range(0, len(frames), batch)]


class Consistency(ABC):
    """A way to denoise a clip's frames at one step, so that they fit together over time.

    Another one, such as a shuffle of frames in grids, is a subclass: it makes the network's passes
    by `sampling.network.run`, with an attention of its own if it needs one.
    """

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling

    @abstractmethod
    def outputs(self, x: Latents, step: Step) -> Iterator[tuple[Sequence[int], Outputs]]:
        """Frames by position, and the network's output for every branch of them, part by part.

        Together they are all frames of this rank, once.
        """


class PerFrame(Consistency):
    """Every frame on its own: the image editing method, frame by frame."""

    def outputs(self, x: Latents, step: Step) -> Iterator[tuple[Sequence[int], Outputs]]:
        s = self.sampling
        for part in s.parts(s.trajectory.positions):
            yield part, s.network.run(s.network.batch(s.inputs(x, part, step), part, step))


class Joint(Consistency):
    """All frames at once, each attending to all of them (equation 3); nothing is propagated."""

    def outputs(self, x: Latents, step: Step) -> Iterator[tuple[Sequence[int], Outputs]]:
        s, frames = self.sampling, self.sampling.trajectory.positions
        all_gather = partial(s.ranks.all_gather, counts=s.shard.frame_counts)
        attention = JointAttention(len(step.branches), all_gather=all_gather)
        batch = s.network.batch(s.inputs(x, frames, step), frames, step, keyframes=True)
        yield frames, s.network.run(batch, attention)


class TokenFlow(Consistency):
    """Keyframes jointly, then every window with the keyframes' features (section 4.2)."""

    def outputs(self, x: Latents, step: Step) -> Iterator[tuple[Sequence[int], Outputs]]:
        s, branches = self.sampling, len(step.branches)
        keyframes = draw_keyframes(
            s.shard.windows, s.settings.keyframes, s.settings.seed, s.name, step.index
        )
        for joint in self.joint_passes(x, keyframes, step):
            bank = Bank()  # the tokens and outputs of the keyframes, at every site
            attention = JointAttention(branches, bank, joint.all_gather, joint.exchange_halo)
            s.network.run(s.network.batch(joint.inputs, joint.frames, step, True), attention)

            held = slice(joint.held.start, joint.held.stop)
            for part in s.parts(s.shard.positions(joint.windows)):
                window, used = neighbourhood(
                    part, s.shard.windows[held], keyframes[held], s.settings.neighbours,
                    s.settings.blend, step.index, len(step.schedule),
                )  # fmt: skip
                propagated = PropagatedAttention(branches, bank, s.matcher, window, used)
                batch = s.network.batch(s.inputs(x, part, step), part, step)
                yield part, s.network.run(batch, propagated)

    def joint_passes(self, x: Latents, keyframes: Sequence[int], step: Step) -> Iterator[JointPass]:
        """One pass of all keyframes, or one per span of windows where attention is windowed.

        With full attention each rank denoises its own keyframes, with the keys and values of all.
        With spans the keyframes' inputs are all-gathered, and a rank denoises those that its
        windows need, so that nothing on the device grows with the clip.
        """
        s, shard = self.sampling, self.sampling.shard
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
                kept = [seen.index(number) for number in held]
                yield JointPass(
                    frames, every[:, list(seen)], mine, held, lambda own: own, Kept(kept)
                )


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
    """Chooses some of a pass's keyframes."""

    numbers: list[int]

    def __call__(self, items: Tensor) -> Tensor:
        return items[self.numbers]


WAYS: dict[str, type[Consistency]] = {"none": PerFrame, "joint": Joint, "tokenflow": TokenFlow}


def sample(
    sampling: Sampling,
    way: type[Consistency],
    x: Latents,
    first: int = 0,
    after_step: AfterStep = lambda done, x: False,
    last: int | None = None,
) -> Latents:
    """Algorithm 1: from the latents at level `first` to those at `last`, by default clean ones.

    Raises:
        DivergedError: A latent became NaN or infinite.
        Preempted: `after_step` asked to stop.
    """
    consistency, trajectory = way(sampling), sampling.trajectory
    with sampling.network.installed():
        for index in range(first, len(sampling.schedule) if last is None else last):
            step, following = sampling.step(index), x.clone()
            for frames, outputs in consistency.outputs(x, step):
                here, source = rows(trajectory.positions, frames), trajectory.source(frames)
                branches = dict(zip(step.branches, outputs.to(x.device), strict=True))
                following[here] = sampling.network.editor.advance(x[here], branches, step, source)
            x = following
            with sampling.ranks.together():
                require_finite(x, f"sampling at step {index} (timestep {step.t})")
            if after_step(index + 1, x):
                raise Preempted
    return x


def overlap(a: range, b: range) -> range:
    """What two runs of numbers have in common."""
    return range(max(a.start, b.start), min(a.stop, b.stop))
