"""Videos in and out: clips, and pictures made of them."""

from tokenflow.video.alpha import transparent
from tokenflow.video.clip import AudioSpan, Clip, VideoError
from tokenflow.video.frames import FrameBuffer, Frames, described, levels, luma
from tokenflow.video.image_folder import image_paths
from tokenflow.video.layout import both_sides, contact_sheet, halves, side_by_side
from tokenflow.video.reader import clip_name, read_clip
from tokenflow.video.sizing import resized
from tokenflow.video.video_file import count_frames
from tokenflow.video.writer import require_writable, write_clip, write_image, write_video

__all__ = [
    "AudioSpan",
    "Clip",
    "FrameBuffer",
    "Frames",
    "VideoError",
    "both_sides",
    "clip_name",
    "contact_sheet",
    "count_frames",
    "described",
    "halves",
    "image_paths",
    "levels",
    "luma",
    "read_clip",
    "require_writable",
    "resized",
    "side_by_side",
    "transparent",
    "write_clip",
    "write_image",
    "write_video",
]
