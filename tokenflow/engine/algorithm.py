"""Algorithm 1 of the paper: the sampling loop, and the ways of consistency, one step each.

Read beside Geyer et al. 2023 (arXiv 2307.10373), section 4. The network's batch is always
branches × frames, the source branch first: its latents are those of DDIM inversion, x are the
edited ones. A joint pass and a propagated pass differ in what the attention sites do.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import ClassVar

import torch

from tokenflow.editors import Step
from tokenflow.engine.attention import Bank, JointAttention, PropagatedAttention
from tokenflow.engine.fusion import fused_latents
from tokenflow.engine.joint_passes import joint_passes
from tokenflow.engine.keyframes import draw_keyframes, neighbourhood
from tokenflow.engine.sampling import PASSES, Latents, Outputs, Sampling
from tokenflow.errors import Preempted

AfterStep = Callable[[int, Latents], bool]
"""Called with the number of steps done and the latents; whether to stop."""


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
    consistency = way(sampling)
    arriving: list[tuple[Sequence[int], Outputs]] = []
    with sampling.network.installed():
        for index in range(first, len(sampling.schedule) if last is None else last):
            step, following, seen = sampling.step(index), x.clone(), set[int]()
            sampling.features.begin(index)
            for frames, outputs in consistency.outputs(x, step):
                seen.update(frames)
                arriving.append((frames, outputs.to("cpu", non_blocking=True)))
                if len(arriving) == PASSES:
                    sampling.advance(arriving, x, following, step)
            sampling.advance(arriving, x, following, step)
            x = sampling.local(consistency.fused(x, following, step), step)
            sampling.features.end()
            sampling.require_all(seen, way.__name__)
            sampling.require_finite(x, step)
            if after_step(index + 1, x):
                raise Preempted
    sampling.features.close()
    return x


class Consistency(ABC):
    """A way to denoise a clip's frames at one step, so that they fit together over time.

    Another one, such as a shuffle of frames in grids, is a subclass: it makes the network's passes
    by `sampling.network.run`, with an attention of its own if it needs one.
    """

    uses_features: ClassVar[bool] = False
    """Whether its passes keep the source's features, and run without the source where they can."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling

    @classmethod
    def cache_key(cls) -> str:
        """A digest of options that the result depends on: a checkpoint is found by it."""
        return ""

    @abstractmethod
    def outputs(self, x: Latents, step: Step) -> Iterator[tuple[Sequence[int], Outputs]]:
        """Frames by position, and the network's output for every branch of them, part by part.

        Together they are all frames of this rank, once.
        """

    def fused(self, x: Latents, following: Latents, step: Step) -> Latents:
        """The latents after a step, from those before it and those that the editor advanced to.

        By default the latter.
        """
        return following


class TokenFlow(Consistency):
    """Keyframes jointly, then every window with the keyframes' features (section 4.2)."""

    uses_features = True
    keyframes: tuple[Sequence[int], Outputs] | None = None
    """Of the step that runs, with their outputs in the joint pass, where these are fused."""

    def outputs(self, x: Latents, step: Step) -> Iterator[tuple[Sequence[int], Outputs]]:
        s, branches = self.sampling, len(step.branches)
        # κ: one keyframe per window, drawn anew in each step
        keyframes = draw_keyframes(
            s.shard.windows, s.settings.keyframes, s.settings.seed, s.name, step.index
        )
        fuses = s.settings.fusion_at(step.index, len(step.schedule)) > 0
        predicted = list[Outputs]()
        for joint in joint_passes(s, x, keyframes, step):
            # T_base: the keyframes' outputs at every site, each attending to all of them
            bank = Bank()
            attention = JointAttention(
                branches, bank, joint.all_gather, joint.exchange_halo, s.features, joint.frames,
                s.network.editor.joint_source,
            )  # fmt: skip
            batch = s.network.batch(joint.inputs, joint.frames, step, keyframes=True)
            output = s.network.run(batch, attention)
            own = [keyframes[number] for number in joint.windows]
            first = joint.frames.index(own[0])
            output = output[:, first : first + len(own)]
            if fuses:
                predicted.append(output.cpu())

            # the other frames: γ by the source's tokens, and F_γ(T_base) in place of attention
            done = own if s.keyframes_once else []
            if done:
                yield done, output
            frames = s.shard.positions(joint.windows)
            parts = s.parts([frame for frame in frames if frame not in done])
            shown = s.parts(done) if s.matcher.wanted(step.index) else []
            held = slice(joint.held.start, joint.held.stop)
            for part in [*parts, *shown]:
                window, used = neighbourhood(
                    part, s.shard.windows[held], keyframes[held], s.settings.neighbours,
                    s.settings.blend, step.index, len(step.schedule),
                )  # fmt: skip
                propagated = PropagatedAttention(
                    branches, bank, s.matcher, window, used, s.features, held.start
                )
                batch = s.network.batch(s.inputs(x, part, step), part, step)
                output = s.network.run(batch, propagated)
                if part in parts:
                    yield part, output
            bank.evict()  # before the next joint pass
        self.keyframes = (keyframes, torch.cat(predicted, dim=1)) if fuses else None

    def fused(self, x: Latents, following: Latents, step: Step) -> Latents:
        if self.keyframes is None:
            return following
        return fused_latents(self.sampling, x, following, *self.keyframes, step)


class Joint(Consistency):
    """All frames at once, each attending to all of them (equation 3); nothing is propagated."""

    uses_features = True

    def outputs(self, x: Latents, step: Step) -> Iterator[tuple[Sequence[int], Outputs]]:
        s, frames = self.sampling, self.sampling.trajectory.positions
        all_gather = partial(s.ranks.all_gather, counts=s.shard.frame_counts)
        attention = JointAttention(
            len(step.branches), all_gather=all_gather, features=s.features, frames=frames,
            joint_source=s.network.editor.joint_source,
        )  # fmt: skip
        batch = s.network.batch(s.inputs(x, frames, step), frames, step, keyframes=True)
        yield frames, s.network.run(batch, attention)


class PerFrame(Consistency):
    """Every frame on its own: the image editing method, frame by frame."""

    def outputs(self, x: Latents, step: Step) -> Iterator[tuple[Sequence[int], Outputs]]:
        s = self.sampling
        for part in s.parts(s.trajectory.positions):
            yield part, s.network.run(s.network.batch(s.inputs(x, part, step), part, step))


WAYS: dict[str, type[Consistency]] = {"tokenflow": TokenFlow, "joint": Joint, "none": PerFrame}
