"""The method over clips, and the Lightning shells around it."""

from tokenflow.engine.editing import Result, edit_clip, edit_latents
from tokenflow.engine.settings import Settings

__all__ = ["Result", "Settings", "edit_clip", "edit_latents"]
