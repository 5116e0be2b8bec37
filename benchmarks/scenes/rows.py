"""The rows of the benchmark: ways to edit a clip, and what they cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from time import process_time
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from benchmarks.scenes.measure import Truth
from tokenflow.diffusion import Backbone
from tokenflow.editors import DDCM, ControlNet, Editor, FlowEdit, PnP, SDEdit
from tokenflow.engine import Settings, edit_clip
from tokenflow.engine.settings import FUSION
from tokenflow.miniature.edits import EDITOR
from tokenflow.propagation import FlowWeighted, NNField, Propagation

Frames = Float[Tensor, "frames 3 height width"]
TRUTH, FLOOR, SOURCE = "true edit", "round trip of the true edit", "round trip of the source"
JOINT, REFERENCE = "joint attention only", "reference"
ALL_FRAMES = "transformer, FlowEdit, joint attention"


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
    """How a row edits: method, kernel, where settings are not the plan's or the default, model."""

    editor: Callable[[], Editor] = lambda: EDITOR
    kernel: Callable[[], Propagation] = NNField
    settings: dict[str, Any] = field(default_factory=dict)
    model: str = "miniature"


PER_FRAME = {"consistency": "none"}
LCM, TRANSFORMER = "miniature-lcm", "miniature-transformer"
WAYS = {
    "per-frame PnP": Way(settings=PER_FRAME),
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

FEW = {"guidance": 3.0}
SHARED_DDCM, SHARED_FLOWEDIT = partial(DDCM, noise="shared"), partial(FlowEdit, noise="shared")
BESIDE = {
    "FlowEdit": Way(FlowEdit),
    "FlowEdit, shared noise": Way(SHARED_FLOWEDIT),
    "DDCM, 8 steps": Way(DDCM, settings=FEW | {"steps": 8}, model=LCM),
    "DDCM, 8 steps, shared noise": Way(SHARED_DDCM, settings=FEW | {"steps": 8}, model=LCM),
    "DDCM, 4 steps, shared noise": Way(SHARED_DDCM, settings=FEW | {"steps": 4}, model=LCM),
    "transformer, PnP": Way(lambda: PnP(0.5, 0.0), model=TRANSFORMER),
    "transformer, FlowEdit": Way(FlowEdit, model=TRANSFORMER),
    "transformer, FlowEdit, shared noise": Way(SHARED_FLOWEDIT, model=TRANSFORMER),
}
"""Editors without inversion, few-step models and a transformer: with TokenFlow."""
EDITORS = {
    name: replace(way, settings=way.settings | more)
    for row, way in BESIDE.items()
    for name, more in ((f"{row}, per frame", PER_FRAME), (row, {}))
}
EDITORS[ALL_FRAMES] = replace(BESIDE["transformer, FlowEdit"], settings={"consistency": "joint"})
INJECTED = {
    "transformer, nothing injected": Way(lambda: PnP(0.0, 0.0), model=TRANSFORMER),
    "transformer, PnP of queries and keys": Way(
        lambda: PnP(0.5, 0.0, inject_values=False), model=TRANSFORMER
    ),
}
"""What else PnP may inject into a transformer; `--rows` alone measures it."""
ENDED = {
    f"TokenFlow, fused until {end}": Way(settings={"fusion": FUSION, "fusion_end": end})
    for end in (0.9, 0.7)
}
"""Fusion in a part of the schedule; `--rows` alone measures it."""
KNOWN = WAYS | CHOICES | EDITORS | INJECTED | ENDED
ROWS = (TRUTH, FLOOR, SOURCE, *WAYS)
CHOSEN_AMONG = (TRUTH, FLOOR, REFERENCE, "TokenFlow", "flow-weighted", *CHOICES)
EDITED_BY = (TRUTH, FLOOR, "per-frame PnP", "TokenFlow", *EDITORS)
EFFORT = {TRUTH: 0.02, FLOOR: 0.05, SOURCE: 0.05, JOINT: 2.0, REFERENCE: 2.0, ALL_FRAMES: 4.0}
"""About how long a row takes where it is not as long as TokenFlow, to tell the time left."""


@dataclass
class Cost:
    """Seconds of processor time, and the network's evaluations: forward calls times their batch."""

    seconds: float = 0.0
    evaluations: int = 0


@contextmanager
def counted(network: nn.Module) -> Iterator[Cost]:
    """What the block costs."""
    cost, begin = Cost(), process_time()

    def count(_: nn.Module, inputs: tuple[Tensor, ...], options: dict[str, Tensor]) -> None:
        cost.evaluations += len(inputs[0] if inputs else options["hidden_states"])

    hook = network.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield cost
    finally:
        hook.remove()
        cost.seconds = process_time() - begin


class Workbench:
    """Edits a clip in every way.

    Args:
        truth: The clip and its true edit.
        plan: What all rows have in common.
    """

    def __init__(self, truth: Truth, plan: Plan) -> None:
        self.truth, self.plan = truth, plan

    def make(self, row: str) -> tuple[Frames, Cost]:
        """A row's frames, and what they cost from source frames to edited ones."""
        if row == TRUTH:
            return self.truth.frames, Cost()
        if row in (FLOOR, SOURCE):
            return self.round_trip(
                self.truth.frames if row == FLOOR else self.truth.source.frames[:]
            )
        return self.edited(row)

    def round_trip(self, frames: Frames) -> tuple[Frames, Cost]:
        """Frames through the VAE."""
        backbone = loaded(Way.model, self.plan.dtype)
        with counted(backbone.network) as cost:
            parts = [backbone.decode(backbone.encode(part)).cpu() for part in frames.split(8)]
        return torch.cat(parts), cost

    def edited(self, row: str) -> tuple[Frames, Cost]:
        plan, way = self.plan, KNOWN[row]
        backbone = loaded(way.model, plan.dtype)
        shared = {
            "steps": plan.steps, "guidance": plan.guidance, "keyframe_every": plan.keyframe_every,
            "inversion_steps": plan.reference_inversion if row == REFERENCE else None,
            "fusion": 0.0,
        }  # fmt: skip
        settings = Settings(**{**shared, **way.settings})
        with counted(backbone.network) as cost:
            edited = edit_clip(
                backbone, self.truth.source, self.truth.edit.prompts, way.editor(), way.kernel(),
                settings,
            )  # fmt: skip
        return edited.clip.frames[:], cost


@cache
def loaded(model: str, dtype: str) -> Backbone:
    """One of the embedded models, on the CPU."""
    return Backbone.load(model, "cpu", dtype)
