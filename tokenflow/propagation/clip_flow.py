"""The optical flow of one clip: each pair of frames computed once, seen from any site."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate

from tokenflow.propagation.base import Motion, Window
from tokenflow.propagation.optical_flow import OpticalFlow, require_flow, warp
from tokenflow.video import Clip


class ClipFlow:
    """Keeps in host memory what is asked for: three numbers per latent pixel and pair of frames.

    Args:
        clip: The source.
        flow: What finds the motion between two of its frames.
        scale: Pixels of a frame in one latent pixel.

    Raises:
        InputError: There can be no flow of this clip.
    """

    def __init__(self, clip: Clip, flow: OpticalFlow, scale: int) -> None:
        flow.prepare(clip)
        self.clip, self.flow, self.scale = clip, flow, scale
        self.pairs: dict[tuple[int, int], Tensor] = {}

    def between(self, start: int, end: int) -> Float[Tensor, "3 h w"]:
        """Displacement (x, y) from `start` to `end` and its inconsistency, in latent pixels.

        The inconsistency of a point is how far from it the flow there and back again ends.
        """
        if (start, end) not in self.pairs:
            there, back = self.measured(start, end), self.measured(end, start)
            self.pairs[start, end] = self.reduced(there, back)
            self.pairs[end, start] = self.reduced(back, there)
        return self.pairs[start, end]

    def measured(self, start: int, end: int) -> Float[Tensor, "2 height width"]:
        """The provider's flow, checked."""
        if start == end:
            return torch.zeros(2, *self.clip.frames.shape[-2:])
        flow = self.flow.between(self.clip, start, end)
        require_flow(flow, self.clip, f"{type(self.flow).__name__} from frame {start} to {end}")
        return flow

    def reduced(
        self, there: Float[Tensor, "2 height width"], back: Float[Tensor, "2 height width"]
    ) -> Float[Tensor, "3 h w"]:
        """Means over latent pixels, of flow and inconsistency at full resolution."""
        inconsistency = (there + warp(back, there)).norm(dim=0, keepdim=True)
        size = [side // self.scale for side in there.shape[-2:]]
        both = torch.cat([there, inconsistency])[None]
        return interpolate(both, size, mode="area")[0] / self.scale

    def motion(self, window: Window, device: torch.device) -> Motion:
        """Between a window's frames and their neighbours, in latent pixels of its site."""
        neighbours = [[window.keyframes[k] for k in pair] for pair in window.neighbours.tolist()]
        pairs = zip(window.frames, neighbours, strict=True)
        seen = torch.stack([self.between(frame, key) for frame, two in pairs for key in two])
        here = interpolate(seen.to(device), (window.height, window.width), mode="area")
        tokens = here.flatten(2).unflatten(0, (-1, 2)) * (window.width / seen.shape[-1])
        return Motion(tokens[:, :, :2].transpose(2, 3), tokens[:, :, 2])
