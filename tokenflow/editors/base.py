"""What an editor is: an image editing method that knows nothing of windows, kernels or ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from diffusers import UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor, nn

from tokenflow.diffusion import Backbone, Schedule, Trajectory
from tokenflow.video import Clip


@dataclass(frozen=True)
class Edit:
    """A change to one module's output, for a part of the schedule.

    `function(edited, source)` is given the edited branches' output (branches, frames, ...) and
    the source branch's (frames, ...), and returns the new edited output. It is on at step i of N
    while `i < int(N * until)`.
    """

    module: nn.Module
    function: Callable[[Tensor, Tensor], Tensor]
    until: float = 1.0


@dataclass(frozen=True)
class Start:
    """Where sampling begins: the first latents, and the timesteps to run, noisiest first."""

    latents: Float[Tensor, "frames c h w"]
    timesteps: tuple[int, ...]


@dataclass(frozen=True)
class Pass:
    """One forward pass of the UNet, as an editor sees it.

    Attributes:
        branches: What the batch is stacked from: "source", "negative", "prompt", or "source" alone
            in inversion.
        frames: Positions in the clip.
        latents: Of every branch and frame.
        embeddings: Of every branch's prompt.
        t: The timestep.
        share: How much of sampling's schedule lies behind, i / N at its step i of N.
    """

    branches: tuple[str, ...]
    frames: tuple[int, ...]
    latents: Float[Tensor, "branches frames c h w"]
    embeddings: Float[Tensor, "branches tokens width"]
    t: int
    share: float


class Editor(ABC):
    """An image editing method, applied to keyframes jointly and to windows by propagation.

    Subclasses are found by their name through the entry point group `tokenflow.editors`; their
    constructor's typed arguments are their options.
    """

    interface: ClassVar[int] = 1
    """The version of this interface that a plugin was written for."""

    @property
    def conditions_source(self) -> bool:
        """Whether `conditioning` may have something for the source alone, and so in inversion.

        Inversions are then kept apart by the editor's options and `content`.
        """
        return type(self).conditioning is not Editor.conditioning

    def prepare(self, backbone: Backbone, clip: Clip) -> None:  # noqa: B027 (need not be overridden)
        """Called once for every clip, before any work: load and check what the edit needs.

        Where several ranks share a clip, `clip` has at least those of its frames that this one
        will ask about: `clip.positions`.

        Raises:
            InputError: Something does not fit the model or the clip.
        """

    def content(self, frame: int) -> str:
        """What else than options, model and source an edit of a frame depends on: nothing.

        An editor that reads files returns a digest of what they say of the frame at this position,
        or of all; after `prepare`. What runs keep is found again where it is the same.
        """
        return ""

    @abstractmethod
    def start(self, trajectory: Trajectory, schedule: Schedule, seed: int) -> Start:
        """The first latents and the timesteps, all of the schedule's or a tail of them.

        Whatever is random must be drawn from `seed` and a frame's index alone.
        """

    def edits(self, unet: UNet2DConditionModel) -> Sequence[Edit]:
        """The changes to install; none by default."""
        return ()

    def conditioning(self, forward: Pass) -> dict[str, Any]:
        """Further arguments of the UNet for one pass; none by default.

        It is asked for every pass, of keyframes and of windows, and in inversion.
        """
        return {}

    def constrain(
        self,
        latents: Float[Tensor, "frames c h w"],
        frames: tuple[int, ...],
        t: int | None,
        trajectory: Trajectory,
    ) -> Float[Tensor, "frames c h w"]:
        """What the latents that a step arrived at become before the next; as they are by default.

        Args:
            latents: Of some of the clip's frames, at timestep `t`; not to be changed in place.
            frames: Their positions in the clip. Each is treated on its own, as ranks share them.
            t: The timestep arrived at, `None` for the clean latent.
            trajectory: The source's latents, at `t` by `trajectory.at`.
        """
        return latents
