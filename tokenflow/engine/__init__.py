"""The method over clips, and the Lightning shells around it."""

from tokenflow.engine.editing import Result, Settings, edit_clip, edit_latents

__all__ = ["Result", "Settings", "edit_clip", "edit_latents"]
