"""What an editor is: an image editing method that knows nothing of windows, kernels or ranks."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from tokenflow.diffusion import Backbone, Conditioning, Schedule, Source, Traits, guide
from tokenflow.diffusion.schedule import Timestep
from tokenflow.video import Clip


@dataclass(frozen=True)
class Prompts:
    """What the edited video shows and does not show, and what the source shows."""

    prompt: str
    negative_prompt: str = ""
    inversion_prompt: str = ""


@dataclass(frozen=True)
class Step:
    """One step of sampling.

    Attributes:
        index: From 0.
        schedule: The noise levels: the step leads from level `index` to `index + 1`.
        guidance: The scale of classifier-free guidance; 1 outside of its part of the schedule, and
            in `advance` for a network that embeds it, whose outputs are guided.
        seed: Of everything random, together with frame and step.
        branches: The names of `Editor.branches`, without `Editor.guided` where there is no
            classifier-free guidance, and without `Editor.idle`.
    """

    index: int
    schedule: Schedule
    guidance: float
    seed: int
    branches: tuple[str, ...]

    @property
    def t(self) -> Timestep:
        """The network's timestep."""
        return self.schedule.timesteps[self.index]

    @property
    def progress(self) -> float:
        """How much of the schedule is behind: i / N at step i of N."""
        return self.index / len(self.schedule)


@dataclass(frozen=True)
class Batch:
    """One forward pass of the network, as an editor sees it.

    Attributes:
        branches: What the batch is stacked from, the source first; the source alone in inversion,
            and all but the source where what an edit takes from it is cached.
        frames: Positions in the clip, the same in every branch.
        latents: Of every branch and frame.
        conditioning: One row per branch and frame, in the order of the batch.
        t: The network's timestep.
        step: Of sampling, from 0; in inversion the one that the timestep falls into.
        steps: Of sampling.
        keyframes: Whether these are keyframes, denoised jointly: else the outputs of self-attention
            are propagated from keyframes, or every frame is on its own.
        inversion: Whether the source is inverted.
    """

    branches: tuple[str, ...]
    frames: tuple[int, ...]
    latents: Float[Tensor, "branches frames c h w"]
    conditioning: Conditioning
    t: Timestep
    step: int
    steps: int
    keyframes: bool = False
    inversion: bool = False

    @property
    def progress(self) -> float:
        """How much of the schedule is behind: i / N at step i of N."""
        return self.step / self.steps


@dataclass(frozen=True)
class Injection:
    """A change to one layer's output, for a part of the schedule.

    `function(edited, source, batch)` is given the layer's output in the edited branches (branches,
    frames, ...) and in the source branch (frames, ...), and returns the new edited output. Without
    a function the edited branches take the source's output, and what leads to this layer alone is
    not computed for them. It is on at step i of N while int(N · begin) <= i < int(N · end).

    In a propagated pass the output of self-attention is taken from keyframes, so that injections
    into its projections have no effect at sites that are `matched`; `batch.keyframes` is true in
    the joint pass.
    """

    layer: str
    function: Callable[[Tensor, Tensor, Batch], Tensor] | None = None
    begin: float = 0.0
    end: float = 1.0

    def active(self, step: int, steps: int) -> bool:
        """Whether it is on at a step."""
        return int(steps * self.begin) <= step < int(steps * self.end)


Processor = Callable[..., Tensor]
"""Cross-attention of one site: `(batch, site, hidden_states, encoder_hidden_states, ...)` to the
layer's output (branches × frames, tokens, channels)."""


@dataclass(frozen=True)
class Start:
    """Where sampling begins: the latents at the level of the first step that runs."""

    latents: Float[Tensor, "frames c h w"]
    step: int = 0


class Editor(ABC):  # noqa: B024 (every method has a default)
    """An image editing method, applied to keyframes jointly and to windows by propagation.

    Subclasses are found by their name through the entry point group `tokenflow.editors`; their
    constructor's typed arguments are their options. Every frame must be treated on its own: which
    frames share a call depends on the batch and on the ranks. What is random is drawn from the
    seed, the frame's position in the clip, and the step.
    """

    interface: ClassVar[int] = 2
    """The version of this interface that a plugin was written for."""

    inverts: ClassVar[bool] = True
    """Whether the source is inverted; without, `source.at` has the clean latents alone."""

    joint_source: ClassVar[bool] = False
    """Whether the source's branch attends to all keyframes, as the edited ones do, not to its own
    frame alone: for a method that takes the difference of their outputs, which else would contain
    the difference of attention, too."""

    def kept(self, step: Step, source: Source) -> Float[Tensor, "frames c h w"]:
        """What x is after a step where nothing is edited: outside of a local edit's mask.

        By default the inverted latents at the level that is reached, or the clean ones.
        """
        return source.clean if self.clean_after(step) else source.at(step.index + 1)

    def clean_after(self, step: Step) -> bool:
        """Whether x are clean latents after a step, rather than at the level that is reached.

        By default without inversion, where sampling starts from clean latents.
        """
        return not self.inverts

    @property
    def guided(self) -> Sequence[str]:
        """The branches that are there for guidance alone: a step with guidance 1 leaves them out.

        By default "negative", and none for an editor that has branches, inputs or an advance of its
        own. A network that embeds the scale of guidance runs without them throughout.
        """
        return () if overrides(self, "branches", "inputs", "advance") else ("negative",)

    def idle(self, step: Step) -> Sequence[str]:
        """The branches that a step does without: they do not run. None by default."""
        return ()

    @property
    def conditions_source(self) -> bool:
        """Whether `conditioning` or `model_inputs` change the source's pass, and so inversion.

        The cache then keeps inversions apart by the editor's options and `cache_key`.
        """
        return overrides(self, "conditioning", "model_inputs")

    @property
    def sees_other_frames(self) -> bool:
        """Whether `conditioning`, `model_inputs` or `cross_attention` need other ranks' frames.

        With windowed keyframe attention, a rank denoises keyframes of its neighbours as well.
        `prepare` is then given the whole clip on every rank.
        """
        return overrides(self, "conditioning", "model_inputs", "cross_attention")

    @property
    def needs_source(self) -> bool:
        """Whether the source's branch must run in every pass, as a method may read or change it.

        Else what injections take from it is cached, and a later edit of the clip runs without it:
        `branches` of a batch and `outputs` of `advance` are then the edited ones.
        """
        return self.joint_source or overrides(
            self, "inputs", "conditioning", "model_inputs", "cross_attention", "advance"
        )

    def branches(self, prompts: Prompts) -> Mapping[str, str]:
        """The branches of the network's batch and the prompt of each; the first is the source.

        An editor with several prompts has a branch for each, and its own `inputs` and `advance`.
        """
        return {
            "source": prompts.inversion_prompt,
            "negative": prompts.negative_prompt,
            "prompt": prompts.prompt,
        }

    def check_model(self, model: Traits) -> None:  # noqa: B027 (need not be overridden)
        """Called before `prepare`, and before a model is loaded to offer what fits it.

        By default every model fits.

        Raises:
            InputError: The model is none that can be edited so.
        """

    def check_steps(self, steps: int) -> None:  # noqa: B027 (need not be overridden)
        """Called with the number of sampling steps before a model is loaded, or anything computed.

        By default any number is right.

        Raises:
            InputError: The edit cannot be made in so many.
        """

    def prepare(self, model: Backbone, clip: Clip) -> None:  # noqa: B027 (need not be overridden)
        """Called once for every clip, before any pass: load and check what the edit needs.

        Where several ranks share a clip, `clip` has at least the frames that this rank denoises:
        `clip.positions`.

        Raises:
            InputError: Something does not fit the model or the clip.
        """

    def cache_key(self, frame: int) -> str:
        """A digest of what the edit of a frame depends on besides options, model and source.

        Called after `prepare`, with the frame's position in the clip. An editor that reads files
        returns a digest of what they hold for this frame, or of all of them.
        """
        return ""

    def start(self, source: Source, schedule: Schedule, seed: int) -> Start:
        """The first latents of the source's frames, and the step to begin with.

        By default the inverted latents at the first step; without inversion the clean ones.
        """
        return Start(source.at(0) if self.inverts else source.clean)

    def inputs(
        self, x: Float[Tensor, "frames c h w"], step: Step, source: Source
    ) -> Float[Tensor, "branches frames c h w"]:
        """What every branch's network input is, from the edited latents and the source.

        By default the source's inverted latents, and x in all other branches.
        """
        return stacked(source.at(step.index).to(x), x, len(step.branches))

    def conditioning(self, batch: Batch) -> Conditioning:
        """The network's conditioning in a pass: by default the prompts' embeddings.

        Called before every pass: of keyframes and windows, and in inversion.
        """
        return batch.conditioning

    def model_inputs(self, batch: Batch) -> dict[str, Any]:
        """Further inputs of the network in a pass, such as a ControlNet's residuals; none.

        Called before every pass: of keyframes and windows, and in inversion.
        """
        return {}

    def injections(self, model: Backbone) -> Sequence[Injection]:
        """The changes of layers' outputs; none by default."""
        return ()

    def cross_attention(self, model: Backbone) -> Mapping[str, Processor]:
        """Replacements of cross-attention, by the names of `model.cross_attention()`; none."""
        return {}

    def advance(
        self,
        x: Float[Tensor, "frames c h w"],
        outputs: Mapping[str, Float[Tensor, "frames c h w"]],
        step: Step,
        source: Source,
    ) -> Float[Tensor, "frames c h w"]:
        """The edited latents at the next level, from the network's output in every branch.

        By default classifier-free guidance, then `Schedule.step`. `source.at(step.index + 1)` are
        the source's latents at the level that is reached.
        """
        prompt = outputs["prompt"]
        guided = guide(outputs.get("negative", prompt), prompt, step.guidance)
        return step.schedule.step(guided, x, step.index)


def overrides(editor: Editor, *names: str) -> bool:
    """Whether an editor has methods of its own in place of the default ones."""
    return any(getattr(type(editor), name) is not getattr(Editor, name) for name in names)


def stacked(
    source: Float[Tensor, "frames c h w"], x: Float[Tensor, "frames c h w"], branches: int
) -> Float[Tensor, "branches frames c h w"]:
    """The source's latents, and the same ones for every other branch."""
    result = x.new_empty(branches, *x.shape)
    result[0], result[1:] = source, x
    return result
