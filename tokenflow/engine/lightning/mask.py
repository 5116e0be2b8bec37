"""What is given beside a source, cut as it: a mask, white where the object is, or the depth."""

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


def cut_mask(
    path: str | Path, source: ClipSource, multiple: int, like: Clip, what: str = "mask"
) -> Clip:
    """A mask or depth, cut and scaled as the source was, unless it is like the edit already.

    Args:
        path: A video or folder of images of the edit's length, or of the source's; or one image,
            which is all frames'.
        source: Whose start, stop, stride, max_frames, resolution and fit it is cut by.
        multiple: What both sides of the edit are divisible by, in pixels.
        like: The edit, or the source as it is edited.
        what: What errors call it, "mask" or "depth".

    Raises:
        InputError: It cannot be read, is transparent, or has another number of frames or
            another size.
    """
    deep = what == "depth"
    # one more than the edit's tells a longer one, of whose frames the source's are read later
    whole = read_clip(local(path), max_frames=len(like) + 1, in_memory=False, deep=deep)
    if (name := transparent(local(path))) is not None:
        raise InputError(
            f"the {what} {path} has an alpha channel (in {name}), and what lies under it is not "
            f"defined: expected opaque frames; flatten it"
        )
    length = (1, len(like)) if len(whole) == 1 else (len(like),)
    if len(whole) in length and tuple(whole.frames.shape[-2:]) == like.display_size:
        return repeated(whole, like)
    scaled = {name: source.choice[name] for name in SCALED if name in source.choice}
    choice = scaled if len(whole) in length else source.choice
    cut = ClipSource(local(path), **choice).read(multiple, deep)
    if len(cut) not in length or cut.display_size != like.display_size:
        raise InputError(
            f"expected a {what} of {described(like)} like the edit, or of its source's length and "
            f"size, got {path}, of {'at least ' if len(whole) > len(like) else ''}"
            f"{described(whole)}, which would be cut to {described(cut)}"
        )
    return repeated(cut, like)


def repeated(mask: Clip, like: Clip) -> Clip:
    """A mask or depth of one frame as one of all of a clip's frames."""
    if len(mask) == len(like):
        return mask
    height, width = mask.frames.shape[-2:]
    frames = Frames(lambda _: mask.frames[0], range(len(like)), (height, width))
    return dataclasses.replace(mask, frames=frames, times=like.times, end=like.end)


def require_one_clip(trainer: Any, option: str, path: str) -> None:
    """Raises `InputError` for one mask or depth and a manifest, whose clips would share it."""
    if any(job.where is not None for job in trainer.datamodule.jobs):
        own = {"model.mask": "edit_mask", "model.depth": "depth"}.get(option, "mask")
        raise InputError(
            f"expected no --{option} with --data.manifest, whose clips would share it, got "
            f"{path}; leave it out, and give each row of the manifest its {own}"
        )


def described(clip: Clip) -> str:
    """How many frames a clip has, and in which size they are shown."""
    height, width = clip.display_size
    return f"{len(clip)} frames of {width}x{height}"
