"""Local edits: outside of a mask the source stays (Avrahami et al. 2022, arXiv 2111.14818)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import cv2
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d, interpolate

from tokenflow.diffusion.trajectory import rows
from tokenflow.errors import InputError
from tokenflow.storage import digests
from tokenflow.video import Clip, Frames

Automatic = Literal["auto"]
AUTO: Automatic = "auto"
"""In place of a mask: one is found from the prompts."""


def white(frames: Tensor | Frames) -> Bool[Tensor, "frames height width"]:
    """Where a mask's frames are white, or of a brighter grey."""
    return torch.stack([frame.mean(dim=0) > 0.5 for frame in frames])


class Region:
    """Where frames may be changed: in latents wherever some white is, in pixels in the white alone.

    Args:
        mask: White where the edit may be; one frame for all of the clip's, or one for each.
        clip: The source as it is edited, or a rank's part of it.
        scale: Pixels of a frame along the side of one latent pixel.
        edge: Pixels, inside of the white, over which the source turns into the edit.

    Raises:
        InputError: The mask has another size than the clip, or another number of frames.

    Attributes:
        latents: Where latents may be changed, of the clip's frames.
    """

    def __init__(self, mask: Clip, clip: Clip, scale: int, edge: float = 0.0) -> None:
        height, width = clip.frames.shape[-2:]
        sizes = (height, width), clip.display_size
        if tuple(mask.frames.shape[-2:]) not in sizes or len(mask) not in (1, clip.total):
            raise InputError(
                f"expected a mask of {width}x{height} with 1 frame or {clip.total}, as the clip is "
                f"edited, got {mask.frames.shape[-1]}x{mask.frames.shape[-2]} with {len(mask)}; "
                f"cut and scale it as the clip was"
            )
        self.mask, self.edge, self.size, self.positions = (
            mask,
            edge,
            (height, width),
            clip.positions,
        )
        cells = height // scale, width // scale
        each = [self.white(position) for position in self.positions]
        self.latents = torch.stack(
            [adaptive_max_pool2d(one[None].float(), cells) > 0 for one in each]
        )
        self.digests = [digests.of_tensors({"mask": one}) for one in each]

    def white(self, position: int) -> Bool[Tensor, "height width"]:
        """Where the frame at a position in the clip may be changed."""
        image = self.mask.frames[position if len(self.mask) > 1 else 0][None]
        if tuple(image.shape[-2:]) != self.size:
            image = interpolate(image, self.size, mode="area")
        return white(image)[0]

    def opacity(self, position: int) -> Float[Tensor, "height width"]:
        """Of the edit over the source: 0 outside of the white, and 1 inside, beyond the edge."""
        inside = self.white(position).byte().numpy()
        distance = cv2.distanceTransform(inside, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        return torch.from_numpy(distance).div(1 + self.edge).clamp(0, 1)

    def within(
        self,
        x: Float[Tensor, "frames c h w"],
        source: Float[Tensor, "frames c h w"],
        frames: Sequence[int],
    ) -> Float[Tensor, "frames c h w"]:
        """Latents of frames, by position in the clip, with the source's outside of the region."""
        inside = self.latents[rows(self.positions, frames)].to(x.device)
        return torch.where(inside, x, source.to(x))

    def composite(
        self,
        edited: Float[Tensor, "frames 3 height width"],
        source: Float[Tensor, "frames 3 height width"],
        frames: Sequence[int],
    ) -> Float[Tensor, "frames 3 height width"]:
        """Frames of an edit over the source's."""
        opacity = torch.stack([self.opacity(frame) for frame in frames])[:, None]
        return opacity * edited + (1 - opacity) * source
