"""What some networks take of every frame beside its latents: depth, or a mask and what it leaves.

Source: the concatenations of Rombach et al. 2022 (arXiv 2112.10752), section 4.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate

from tokenflow.diffusion import Backbone
from tokenflow.diffusion.backbone import FurtherChannels
from tokenflow.diffusion.schedule import require_finite
from tokenflow.engine.ranks.group import FrameGroup
from tokenflow.engine.ranks.shard import WindowShard
from tokenflow.engine.region import AUTO, Region
from tokenflow.errors import InputError
from tokenflow.storage import digests
from tokenflow.video import Clip

GREY = 0.5
"""Of the masked frames: 0 in a VAE's -1..1."""


@dataclass(frozen=True)
class FrameChannels:
    """What the network takes beside the latents.

    Attributes:
        frames: Of all the clip's frames, in host memory; None of a model that takes nothing.
        digests: Of what this rank's frames have, in cache keys; whatever batches a VAE took.
    """

    frames: Float[Tensor, "frames d h w"] | None = None
    digests: Sequence[str] = ()


def require_given(taken: FurtherChannels | None, mask: object, depth: object) -> None:
    """Raises `InputError` unless a model is given what it takes beside latents, and no more."""
    if taken == "depth" and depth is None:
        raise InputError(
            "expected the depth of the clip for this model, which is given it beside the latents, "
            "got none; give a video, folder of images or image by --model.depth (in Python depth=)"
        )
    if taken == "mask" and mask is None:
        raise InputError(
            "expected a mask for this model, which is for inpainting, got none; give a video, "
            "folder of images or image by --model.mask (in Python mask=), white where the edit is "
            "to be"
        )
    if taken == "mask" and mask == AUTO:
        raise InputError(
            "expected a mask of a file for this model, which sees it in every pass, got an "
            "automatic one; find one with another model, which leaves it in the run's folder"
        )
    if taken != "depth" and depth is not None:
        raise InputError(
            "expected no depth for this model, which does not take it, got one; leave out "
            "--model.depth (in Python depth=), or choose a model that does, such as Stable "
            "Diffusion 2's for depth"
        )


def further_channels(
    model: Backbone,
    clip: Clip,
    region: Region | None,
    depth: Clip | None,
    batch: int,
    ranks: FrameGroup,
    shard: WindowShard,
) -> FrameChannels:
    """What the network takes beside the latents, on all ranks of the whole clip.

    Args:
        model: That `require_given` has let pass.
        clip: This rank's frames.
        region: Where they may be changed.
        depth: Of the whole clip, or one frame for all.
        batch: Frames that the VAE encodes at once.
        ranks: That share the clip.
        shard: Which frames each has.

    Raises:
        InputError: The depth does not fit the clip, or is the same everywhere.
    """
    taken, own, keys = model.further_channels, torch.empty(0), list[str]()
    with ranks.together(), ranks.preemption.interruptible():
        if taken == "mask" and region is not None:
            own, keys = mask_channels(model, clip, region, batch), region.digests
        if taken == "depth" and depth is not None:
            own = depth_channels(depth, clip, model.latent_scale)
    if taken is None:
        return FrameChannels()
    every = ranks.all_gather(own, shard.frame_counts, host=True)
    if taken == "depth":
        every = normalised(every)
        here = every[clip.positions.start : clip.positions.stop]
        keys = [digests.of_tensors({"depth": frame}) for frame in here]
    return FrameChannels(every, keys)


def mask_channels(
    model: Backbone, clip: Clip, region: Region, batch: int
) -> Float[Tensor, "frames d h w"]:
    """1 where a frame is to be painted, else 0, and the latents of the frame with grey there."""
    parts = []
    for some in torch.arange(len(clip)).split(batch):
        white = torch.stack([region.white(clip.positions[n]) for n in some.tolist()])[:, None]
        latents = model.encode(torch.where(white, GREY, clip.frames[some])).cpu()
        require_finite(latents, "the encoded frames outside of the mask")
        parts.append(torch.cat([interpolate(white.float(), latents.shape[-2:]), latents], dim=1))
    return torch.cat(parts)


def depth_channels(depth: Clip, clip: Clip, scale: int) -> Float[Tensor, "frames 1 h w"]:
    """The depth of a clip's frames at their latents' size.

    Raises:
        InputError: It has another size than the clip, or another number of frames.
    """
    height, width = clip.frames.shape[-2:]
    found = tuple(depth.frames.shape[-2:])
    if found not in ((height, width), clip.display_size) or len(depth) not in (1, clip.total):
        raise InputError(
            f"expected a depth of {width}x{height} with 1 frame or {clip.total}, as the clip is "
            f"edited, got {found[1]}x{found[0]} with {len(depth)}; cut and scale it as the clip was"
        )
    positions = clip.positions if len(depth) > 1 else [0] * len(clip)
    size = height // scale, width // scale
    frames = (depth.frames[position].mean(dim=0)[None, None] for position in positions)
    return torch.cat([interpolate(one, size, mode="bicubic") for one in frames])


def normalised(depth: Float[Tensor, "frames 1 h w"]) -> Float[Tensor, "frames 1 h w"]:
    """A clip's depth in -1..1: by the whole clip, as frame by frame it would flicker.

    Raises:
        InputError: It is the same everywhere.
    """
    least, most = depth.aminmax()
    if least == most:
        raise InputError(
            f"the depth is the same everywhere (level {255 * float(least):.3g} of 255): expected "
            f"near and far to differ, bright where near; check that the right file was given"
        )
    return 2 * (depth - least) / (most - least) - 1
