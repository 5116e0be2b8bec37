"""Plug-and-Play that keeps the background (as in Blended Diffusion, Avrahami et al. 2022)."""

from pathlib import Path

import torch
from torch.nn.functional import interpolate

from tokenflow.editors import PnP
from tokenflow.editors.conditions import same_aspect, sizes
from tokenflow.errors import InputError
from tokenflow.storage.digests import of_tensors
from tokenflow.video import read_clip, transparent


class LocalPnP(PnP):
    """Edits a region; elsewhere every step's latents are put back to the source's.

    Args:
        attention: As of PnP: share of the steps with the source's queries and keys, 0 to 1; the
            model's own if not given.
        features: As of PnP: share of the steps with the source's features, 0 to 1; likewise.
        box: The region's left, top, right and bottom, as shares of the frame's sides.
        mask: The region as a video or a folder of images instead, white where the edit may be: one
            image for all frames, or one for each. Grey mixes.
    """

    interface = 2

    def __init__(
        self,
        attention: float | None = None,
        features: float | None = None,
        box: tuple[float, float, float, float] = (0.25, 0.25, 0.75, 0.75),
        mask: str | None = None,
    ) -> None:
        super().__init__(attention, features)
        left, top, right, bottom = box
        if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            raise InputError(f"box must be left < right and top < bottom, from 0 to 1, got {box}")
        self.box, self.mask = box, mask

    def prepare(self, model, clip):
        if self.mask is None:
            height, width = clip.frames.shape[-2:]
            left, top, right, bottom = self.box
            masks = torch.zeros(1, 1, height, width)
            columns = slice(round(left * width), round(right * width))
            masks[..., round(top * height) : round(bottom * height), columns] = 1
        else:
            masks = read_clip(self.mask).frames.mean(dim=1, keepdim=True)
            if (name := transparent(Path(self.mask))) is not None:
                raise InputError(f"the mask {name} has an alpha channel; save black and white")
            if not any(same_aspect(masks.shape[-2:], size) for size in sizes(clip)):
                raise InputError(f"the mask {self.mask} has another aspect than the clip; crop it")
        if len(masks) not in (1, clip.total):
            raise InputError(
                f"the mask {self.mask} has {len(masks)} frames and the clip {clip.total}; give one "
                f"image, or one for each frame that is edited"
            )
        size = [side // model.latent_scale for side in clip.frames.shape[-2:]]
        self.region = interpolate(masks, size, mode="area").expand(clip.total, -1, -1, -1)
        if self.region.max() == 0:
            raise InputError("the region is empty, so nothing would be edited; make it larger")

    def cache_key(self, frame):
        return of_tensors({"region": self.region[frame]})

    def advance(self, x, outputs, step, source):
        region, edited = self.region[list(source.frames)], super().advance(x, outputs, step, source)
        return region * edited + (1 - region) * source.at(step.index + 1)
