"""ControlNet (Zhang et al. 2023, arXiv 2302.05543): structure from control images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tokenflow.diffusion import Backbone, FittedControlNet, Traits, load_controlnet
from tokenflow.diffusion.controlnet import check_controlnet
from tokenflow.diffusion.trajectory import rows
from tokenflow.editors.base import Batch
from tokenflow.editors.conditions import Canny, Condition
from tokenflow.editors.sdedit import SDEdit
from tokenflow.errors import InputError
from tokenflow.storage import digests
from tokenflow.video import Clip, Frames


@dataclass(frozen=True)
class Control:
    """One ControlNet and what it is shown.

    Args:
        model: A ControlNet's folder in diffusers' layout, the id of a hub model, or "miniature",
            the embedded one for Canny edges.
        condition: Makes the control images, by class name; Canny when not given.
        scale: Of the residuals that it adds to the network's layers, 0 or more.
        begin: Share of the schedule, 0 to 1, at which it sets in.
        end: Share at which it stops: it is on at step i of N while begin <= i / N < end.
    """

    model: str = "miniature"
    condition: Condition | None = None
    scale: float = 1.0
    begin: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.scale < float("inf"):
            raise InputError(f"a control's scale is a number from 0 up, got {self.scale}")
        if not 0 <= self.begin < self.end <= 1:
            raise InputError(
                f"a control is on from one share of the schedule to another, "
                f"0 <= begin < end <= 1; got begin {self.begin} and end {self.end}"
            )


class Shown(NamedTuple):
    """A control ready for a clip: `images`, or what the network sees of them, at `positions`."""

    control: Control
    network: FittedControlNet
    images: Tensor | Frames
    positions: range


class ControlNet(SDEdit):
    """Starts as SDEdit does, and holds the edit to control images, by one ControlNet or several.

    The edited branches are controlled, in keyframes' and windows' passes alike; residuals of
    several controls add up. `model` to `end` describe the first control.

    Args:
        model: A ControlNet's folder in diffusers' layout, the id of a hub model, or "miniature",
            the embedded one for Canny edges.
        condition: Makes the control images, by class name: Canny (when not given) or ControlVideo.
        scale: Of the residuals that it adds to the network's layers, 0 or more.
        begin: Share of the schedule, 0 to 1, at which it sets in.
        end: Share at which it stops: it is on at step i of N while begin <= i / N < end.
        further: More controls with the same five options each, in a list.
        control_source: Controls the source branch as well, in inversion and in sampling.
        strength: How much of sampling runs, as SDEdit's.
        noise: What the first latent is made of, as SDEdit's.
    """

    def __init__(
        self,
        model: str = "miniature",
        condition: Condition | None = None,
        scale: float = 1.0,
        begin: float = 0.0,
        end: float = 1.0,
        further: Sequence[Control] = (),
        control_source: bool = False,
        strength: float = 1.0,
        noise: str = "inverted",
    ) -> None:
        super().__init__(strength, noise)
        require_controls(further)
        self.controls = (Control(model, condition, scale, begin, end), *further)
        self.control_source = control_source
        self.backbone: Backbone | None = None
        self.shown: tuple[Shown, ...] = ()
        self.digests: dict[str, str] = {}
        """Of the networks, by model; computed on first use."""

    @property
    def conditions_source(self) -> bool:
        return self.control_source

    @property
    def needs_source(self) -> bool:
        return self.control_source

    def check_model(self, model: Traits) -> None:
        """Raises `ModelError` where a ControlNet that is not loaded was made for another model."""
        loaded = {shown.control.model for shown in self.shown}
        for name in {control.model: None for control in self.controls}:
            if name not in loaded:
                check_controlnet(name, model)

    def prepare(self, model: Backbone, clip: Clip) -> None:
        """Loads what is not loaded yet, and makes the clip's control images.

        Raises:
            ModelError: A ControlNet cannot be loaded or was made for another model.
            InputError: A control video does not fit the clip.
        """
        loaded = {}
        if model is self.backbone:
            loaded = {shown.control.model: shown.network for shown in self.shown}
        else:
            self.digests = {}
        ready = []
        for control in self.controls:
            if control.model not in loaded:
                loaded[control.model] = load_controlnet(control.model, model)
            network, images = loaded[control.model], (control.condition or Canny()).of(clip)
            if network.encodes:  # one by one, as the digests of batches may differ
                each = (network.seen(images[[place]]).cpu() for place in range(len(images)))
                images = torch.cat(list(each))
            ready.append(Shown(control, network, images, clip.positions))
        self.backbone, self.shown = model, tuple(ready)

    def cache_key(self, frame: int) -> str:
        """The networks' weights, and the frame's control images."""
        for shown in self.shown:
            if shown.control.model not in self.digests:
                self.digests[shown.control.model] = digests.of_network(shown.network.network)
        images = {
            str(number): shown.images[shown.positions.index(frame)]
            for number, shown in enumerate(self.shown)
        }
        weights = [self.digests[shown.control.model] for shown in self.shown]
        return digests.of_values(weights, digests.of_tensors(images))

    @torch.no_grad()
    def model_inputs(self, batch: Batch) -> dict[str, Any]:
        """The residuals of the controls that are on, nothing where none is.

        Raises:
            InputError: `prepare` has not been called.
        """
        if not self.shown:
            raise InputError("a ControlNet needs prepare(model, clip) before it is used")
        on = [s for s in self.shown if s.control.begin <= batch.progress < s.control.end]
        each = [
            residuals(shown, batch, chosen)
            for shown in on
            if (chosen := self.controlled(batch.branches, shown.network))
        ]
        if not each:
            return {}
        together = [sum(same[1:], start=same[0]) for same in zip(*each, strict=True)]
        return on[0].network.inputs(together)

    def controlled(self, branches: Sequence[str], network: FittedControlNet) -> list[int]:
        """The numbers of the branches that a network controls.

        A network that pools its control image over all places controls the prompt's branch alone:
        in both branches, guidance would cancel its effect.
        """
        without = {"negative"} if network.pools else set()
        if not self.control_source:
            without.add("source")
        return [i for i, name in enumerate(branches) if name not in without]


def require_controls(further: Sequence[object]) -> None:
    """Raises `InputError` for anything but controls, as the mappings that YAML writes them as."""
    for one in further:
        if not isinstance(one, Control):
            raise InputError(
                f"further expects a list of tokenflow.editors.Control, got one {type(one).__name__}"
                f"; in Python write Control(model=..., scale=...)"
            )


def residuals(
    shown: Shown, batch: Batch, chosen: Sequence[int]
) -> list[Float[Tensor, "batch ..."]]:
    """What one ControlNet adds to the backbone's layers.

    The network's batch is branches × frames; branches that are not chosen get zeros.
    """
    images = shown.images[rows(shown.positions, batch.frames)]
    branches, frames = len(batch.branches), len(batch.frames)

    def of_chosen(every: Tensor) -> Tensor:
        return every.unflatten(0, (branches, frames))[list(chosen)].flatten(0, 1)

    added = shown.network.residuals(
        batch.latents[list(chosen)].flatten(0, 1),
        batch.t,
        batch.conditioning.map(of_chosen),
        images.repeat(len(chosen), 1, 1, 1),
        shown.control.scale,
    )

    def of_all_branches(part: Tensor) -> Tensor:
        every = part.new_zeros(branches, frames, *part.shape[1:])
        every[list(chosen)] = part.unflatten(0, (len(chosen), frames))
        return every.flatten(0, 1)

    return [of_all_branches(part) for part in added]
