"""The rows of the benchmark: ways to edit a clip, and what they cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import process_time
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.scenes.measure import Truth
from tokenflow.diffusion import Backbone, Trajectory, invert
from tokenflow.editors import ControlNet, Editor, PnP, SDEdit
from tokenflow.engine import Settings, edit_latents
from tokenflow.engine.settings import FUSION
from tokenflow.miniature.edits import EDITOR
from tokenflow.propagation import ClipFlow, FlowWeighted, LatentFlow, NNField, Propagation

Frames = Float[Tensor, "frames 3 height width"]
TRUTH, FLOOR, SOURCE = "true edit", "round trip of the true edit", "round trip of the source"
JOINT, REFERENCE = "joint attention only", "reference"


@dataclass(frozen=True)
class Plan:
    """What all rows have in common.

    Attributes:
        frames: Of a clip.
        steps: Of sampling, and of inversion but for the reference.
        reference_inversion: Inversion steps of the reference; 500 in the published code.
        guidance: Scale of classifier-free guidance.
        keyframe_every: Frames in a window.
        dtype: Of the networks.
    """

    frames: int = 16
    steps: int = 15
    reference_inversion: int = 60
    guidance: float = 4.0
    keyframe_every: int = 8
    dtype: str = "bfloat16"


@dataclass(frozen=True)
class Way:
    """How a row edits: image editing method, kernel, and where its settings are not the default."""

    editor: Callable[[], Editor] = lambda: EDITOR
    kernel: Callable[[], Propagation] = NNField
    settings: dict[str, Any] = field(default_factory=dict)


WAYS = {
    "per-frame PnP": Way(settings={"consistency": "none"}),
    JOINT: Way(settings={"consistency": "joint"}),
    REFERENCE: Way(
        lambda: PnP(EDITOR.attention, EDITOR.features, EDITOR.feature_layers, "renoised"),
        settings={"neighbours": "previous", "keyframe_attention": "full"},
    ),
    "TokenFlow": Way(),
    "TokenFlow, fused": Way(settings={"fusion": FUSION}),
    "flow-weighted": Way(kernel=FlowWeighted),
    "SDEdit": Way(SDEdit),
    "ControlNet": Way(ControlNet),
}
CHOICES = {
    "a keyframe in 4": Way(settings={"keyframe_every": 4}),
    "a keyframe in 16": Way(settings={"keyframe_every": 16}),
    "previous neighbours": Way(settings={"neighbours": "previous"}),
    "linear blend": Way(settings={"blend": "linear"}),
    "features 0.5": Way(lambda: PnP(0.5, 0.5, 5)),
    "features 0.8": Way(lambda: PnP(0.5, 0.8, 5)),
    "attention 0.3": Way(lambda: PnP(0.3, 0.3, 5)),
    "the paper's PnP": Way(lambda: PnP(0.5, 0.8, 1)),
    "features 0.5, flow, 16": Way(lambda: PnP(0.5, 0.5, 5), FlowWeighted, {"keyframe_every": 16}),
}
"""TokenFlow with one choice made otherwise, and last with those that do it good; `EDITOR` has
attention 0.5 and features 0.3 in 5."""
ROWS = (TRUTH, FLOOR, SOURCE, *WAYS)
CHOSEN_AMONG = (TRUTH, FLOOR, REFERENCE, "TokenFlow", "flow-weighted", *CHOICES)
EFFORT = {TRUTH: 0.02, FLOOR: 0.05, SOURCE: 0.05, JOINT: 2.0, REFERENCE: 2.0}
"""About how long a row takes where it is not as long as TokenFlow, to tell the time left."""


@dataclass
class Cost:
    """Seconds of processor time, and the UNet's evaluations: forward calls times their batch."""

    seconds: float = 0.0
    evaluations: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.seconds + other.seconds, self.evaluations + other.evaluations)


@contextmanager
def counted(backbone: Backbone) -> Iterator[Cost]:
    """What the block costs."""
    cost, begin = Cost(), process_time()

    def count(_: Any, arguments: tuple[Tensor, ...]) -> None:
        cost.evaluations += len(arguments[0])

    hook = backbone.unet.register_forward_pre_hook(count)
    try:
        yield cost
    finally:
        hook.remove()
        cost.seconds = process_time() - begin


class Workbench:
    """One clip and what its rows share: an inversion is done once, and counted in each.

    Args:
        backbone: The frozen model.
        truth: The clip and its true edit.
        plan: What all rows have in common.
    """

    def __init__(self, backbone: Backbone, truth: Truth, plan: Plan) -> None:
        self.backbone, self.truth, self.plan = backbone, truth, plan
        self.schedule = backbone.schedule(plan.steps)
        self.inverted: dict[int, tuple[Trajectory, Cost]] = {}

    def make(self, row: str) -> tuple[Frames, Cost]:
        """A row's frames, and what they cost from source frames to edited ones."""
        if row == TRUTH:
            return self.truth.frames, Cost()
        if row in (FLOOR, SOURCE):
            frames = self.truth.frames if row == FLOOR else self.truth.source.frames[:]
            with counted(self.backbone) as cost:
                back = self.decoded(self.encoded(frames))
            return back, cost
        return self.edited(row)

    def edited(self, row: str) -> tuple[Frames, Cost]:
        plan, way, edit = self.plan, {**WAYS, **CHOICES}[row], self.truth.edit
        steps = plan.reference_inversion if row == REFERENCE else plan.steps
        trajectory, before = self.inversion(max(steps, plan.steps))
        editor, kernel = way.editor(), way.kernel()
        settings = Settings(
            steps=plan.steps, guidance=plan.guidance,
            **{"keyframe_every": plan.keyframe_every, "fusion": 0.0, **way.settings},
        )  # fmt: skip
        with counted(self.backbone) as cost:
            editor.prepare(self.backbone, self.truth.source)
            source = self.truth.source
            flow, scale = None, self.backbone.latent_scale
            if kernel.flow is not None:
                flow = ClipFlow(source, kernel.flow, scale)
            elif settings.fusion:
                flow = LatentFlow(source, scale)
            latents = edit_latents(
                self.backbone, trajectory, self.schedule, edit.prompts, editor, kernel, settings,
                name=source.name, flow=flow,
            )  # fmt: skip
            frames = self.decoded(latents)
        return frames, before + cost

    def inversion(self, steps: int) -> tuple[Trajectory, Cost]:
        """The source's trajectory by so many steps, and what it cost."""
        if steps not in self.inverted:
            with counted(self.backbone) as cost:
                latents = self.encoded(self.truth.source.frames[:])
                prompt = str(self.truth.edit.scene.attributes)
                trajectory = invert(self.backbone, latents, prompt, self.schedule, steps)
            self.inverted[steps] = trajectory, cost
        return self.inverted[steps]

    def encoded(self, frames: Frames) -> Tensor:
        return torch.cat([self.backbone.encode(part).cpu() for part in frames.split(8)])

    def decoded(self, latents: Tensor) -> Frames:
        return torch.cat([self.backbone.decode(part).cpu() for part in latents.split(8)])
