"""The optical flow of one clip: each pair of frames measured once, for kernels and metrics."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate

from tokenflow.propagation.base import Motion, Window
from tokenflow.propagation.flow.base import OpticalFlow, require_flow, warp
from tokenflow.storage.scratch import BUDGET, Spill
from tokenflow.video import Clip

Flow = Float[Tensor, "3 h w"]


class ClipFlow:
    """Flow between the frames of a clip, kept on the host: 24 bytes a pixel and pair of frames.

    Args:
        clip: Whose frames they are.
        flow: What finds the motion between two of them.
        scale: Pixels of a frame in one pixel of what is kept: those in a latent pixel for kernels,
            1 for metrics.
        budget: Bytes that are kept; further pairs are measured each time. When not given all are,
            in memory up to `BUDGET`, then in files.

    Raises:
        InputError: There can be no flow of this clip.
    """

    def __init__(
        self, clip: Clip, flow: OpticalFlow, scale: int = 1, budget: int | None = None
    ) -> None:
        flow.prepare(clip)
        self.clip, self.flow, self.scale, self.budget = clip, flow, scale, budget
        self.spill = Spill(BUDGET if budget is None else budget)
        self.pairs: dict[tuple[int, int], tuple[Flow, Flow]] = {}

    def between(self, start: int, end: int) -> tuple[Flow, Flow]:
        """Flow there and back: displacement (x, y) and its inconsistency, in pixels that are kept.

        The inconsistency of a point is how far from it the flow there and back again ends.

        Raises:
            InputError: The provider's flow is of another shape, or has NaN or infinite values.
        """
        if start > end:
            return self.between(end, start)[::-1]
        if (start, end) in self.pairs:
            return self.pairs[start, end]
        both = self.pair(start, end)
        size = sum(flow.nbytes for flow in both)
        if self.budget is None or (len(self.pairs) + 1) * size <= self.budget:
            there, back = both
            both = self.pairs[start, end] = self.spill.keep(there), self.spill.keep(back)
        return both

    def pair(self, start: int, end: int) -> tuple[Flow, Flow]:
        """What `between` gives, anew."""
        there, back = self.measured(start, end), self.measured(end, start)
        there, back = with_inconsistency(there, back), with_inconsistency(back, there)
        return self.reduced(there), self.reduced(back)

    def measured(self, start: int, end: int) -> Float[Tensor, "2 height width"]:
        """The provider's flow, checked."""
        if start == end:
            return torch.zeros(2, *self.clip.frames.shape[-2:])
        flow = self.flow.between(self.clip, start, end)
        require_flow(flow, self.clip, f"{type(self.flow).__name__} from frame {start} to {end}")
        return flow

    def reduced(self, flow: Float[Tensor, "c height width"]) -> Float[Tensor, "c h w"]:
        """Means over the pixels in one that is kept, in such pixels."""
        size = [side // self.scale for side in flow.shape[-2:]]
        return interpolate(flow[None], size, mode="area")[0] / self.scale

    def moved(self, window: Window) -> Window:
        """A window of whole latents with the motion between its frames and their neighbours."""
        height, width = (side // self.scale for side in self.clip.frames.shape[-2:])
        window = replace(window, height=height, width=width)
        return replace(window, motion=self.motion(window, torch.device("cpu")))

    def motion(self, window: Window, device: torch.device) -> Motion:
        """Between a window's frames and their neighbours, in latent pixels of its site."""
        neighbours = [[window.keyframes[k] for k in pair] for pair in window.neighbours.tolist()]
        pairs = zip(window.frames, neighbours, strict=True)
        seen = torch.stack([self.between(frame, key)[0] for frame, two in pairs for key in two])
        here = interpolate(seen.to(device), (window.height, window.width), mode="area")
        tokens = here.flatten(2).unflatten(0, (-1, 2)) * (window.width / seen.shape[-1])
        return Motion(tokens[:, :, :2].transpose(2, 3), tokens[:, :, 2])


def with_inconsistency(there: Float[Tensor, "2 h w"], back: Float[Tensor, "2 h w"]) -> Flow:
    """A flow, and how far from each point the flow there and back again ends."""
    x, y = there + warp(back, there)
    return torch.cat([there, torch.hypot(x, y)[None]])
