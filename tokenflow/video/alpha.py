"""Transparency, which `read_clip` drops: to be refused where what lies under it matters."""

from pathlib import Path

from PIL import Image

from tokenflow.video.image_folder import FORMATS, SUFFIXES, UNREADABLE, image_paths
from tokenflow.video.video_file import open_container, picture_stream

OPAQUE = 255


def transparent(path: Path) -> str | None:
    """The name of what is transparent in a video file or image folder, if anything is.

    Images with an alpha channel that is opaque throughout do not count; a video file's alpha
    channel does, whatever it holds. What cannot be read is left for `read_clip` to refuse.
    """
    if path.is_dir():
        return next((image.name for image in image_paths(path) if _is_transparent(image)), None)
    if path.suffix.lower() in SUFFIXES:
        return path.name if _is_transparent(path) else None
    with open_container(path) as container:
        stream = picture_stream(container)
        if stream is None:
            return None
        format = stream.codec_context.format if stream.codec_context else None
        hidden = stream.metadata.get("alpha_mode") == "1"  # WebM keeps it beside the picture
        return (
            path.name if hidden or (format and any(c.is_alpha for c in format.components)) else None
        )


def _is_transparent(path: Path) -> bool:
    try:
        with Image.open(path, formats=FORMATS) as image:
            if not image.has_transparency_data:
                return False
            return min(image.convert("RGBA").getchannel("A").tobytes()) < OPAQUE
    except UNREADABLE:
        return False
