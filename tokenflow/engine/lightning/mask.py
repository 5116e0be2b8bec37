"""The mask of an edit: a video or folder of images, white where the object is."""

from __future__ import annotations

from pathlib import Path

from tokenflow.engine.lightning.job import ClipSource
from tokenflow.errors import InputError
from tokenflow.storage.paths import local
from tokenflow.video import Clip, read_clip

SCALED = ("resolution", "fit")
"""Options of a source that choose no frames."""


def cut_mask(path: str | Path, source: ClipSource, multiple: int, like: Clip) -> Clip:
    """A mask, cut and scaled as the source was, unless it is like the edit already.

    Args:
        path: A video or folder of images of the edit's length, or of the source's.
        source: Whose start, stop, stride, max_frames, resolution and fit it is cut by.
        multiple: What both sides of the edit are divisible by, in pixels.
        like: The edit, or the source as it is edited.

    Raises:
        InputError: The mask cannot be read, or has another number of frames or another size.
    """
    size = (len(like), like.display_size)
    whole = read_clip(local(path), in_memory=False)
    if (len(whole), tuple(whole.frames.shape[-2:])) == size:
        return whole
    scaled = {name: source.choice[name] for name in SCALED if name in source.choice}
    choice = scaled if len(whole) == len(like) else source.choice
    cut = ClipSource(local(path), **choice).read(multiple)
    if (len(cut), cut.display_size) != size:
        raise InputError(
            f"expected a mask of {described(like)} like the edit, or of its source's length and "
            f"size, got {path}, of {described(whole)}, which would be cut to {described(cut)}"
        )
    return cut


def described(clip: Clip) -> str:
    """How many frames a clip has, and in which size they are shown."""
    height, width = clip.display_size
    return f"{len(clip)} frames of {width}x{height}"
