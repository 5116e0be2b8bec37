"""The mask of an edit: a video, folder of images or one image, white where the object is."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from tokenflow.engine.lightning.job import ClipSource
from tokenflow.errors import InputError
from tokenflow.storage.paths import local
from tokenflow.video import Clip, Frames, read_clip, transparent

SCALED = ("resolution", "fit")
"""Options of a source that choose no frames."""


def cut_mask(path: str | Path, source: ClipSource, multiple: int, like: Clip) -> Clip:
    """A mask, cut and scaled as the source was, unless it is like the edit already.

    Args:
        path: A video or folder of images of the edit's length, or of the source's; or one image,
            which is all frames' mask.
        source: Whose start, stop, stride, max_frames, resolution and fit it is cut by.
        multiple: What both sides of the edit are divisible by, in pixels.
        like: The edit, or the source as it is edited.

    Raises:
        InputError: The mask cannot be read, is transparent, or has another number of frames or
            another size.
    """
    whole = read_clip(local(path), in_memory=False)
    if (name := transparent(local(path))) is not None:
        raise InputError(
            f"the mask {path} has an alpha channel (in {name}), and what lies under it is not "
            f"defined: expected black and white; flatten it"
        )
    length = (1, len(like)) if len(whole) == 1 else (len(like),)
    if len(whole) in length and tuple(whole.frames.shape[-2:]) == like.display_size:
        return repeated(whole, like)
    scaled = {name: source.choice[name] for name in SCALED if name in source.choice}
    choice = scaled if len(whole) in length else source.choice
    cut = ClipSource(local(path), **choice).read(multiple)
    if len(cut) not in length or cut.display_size != like.display_size:
        raise InputError(
            f"expected a mask of {described(like)} like the edit, or of its source's length and "
            f"size, got {path}, of {described(whole)}, which would be cut to {described(cut)}"
        )
    return repeated(cut, like)


def repeated(mask: Clip, like: Clip) -> Clip:
    """A mask of one frame as one of all of a clip's frames."""
    if len(mask) == len(like):
        return mask
    height, width = mask.frames.shape[-2:]
    frames = Frames(lambda _: mask.frames[0], range(len(like)), (height, width))
    return dataclasses.replace(mask, frames=frames, times=like.times, end=like.end)


def require_one_clip(trainer: Any, group: str, mask: str) -> None:
    """Raises `InputError` for one mask and a manifest, whose clips would share it."""
    if any(job.where is not None for job in trainer.datamodule.jobs):
        remedy = "; leave it out, and give each row of the manifest its mask"
        raise InputError(
            f"expected no --{group}.mask with --data.manifest, whose clips would share it, got "
            f"{mask}{remedy if group == 'metrics' else '; edit these clips one by one'}"
        )


def described(clip: Clip) -> str:
    """How many frames a clip has, and in which size they are shown."""
    height, width = clip.display_size
    return f"{len(clip)} frames of {width}x{height}"
