"""The method over clips: Algorithm 1, and what it takes from frames to frames."""

from tokenflow.engine.algorithm import Consistency, Joint, PerFrame, TokenFlow, sample
from tokenflow.engine.edit import Result, edit_clip, edit_latents
from tokenflow.engine.probe import find_correspondences
from tokenflow.engine.sampling import Sampling
from tokenflow.engine.settings import Settings
from tokenflow.engine.source_cache import SourceCache

__all__ = [
    "Consistency",
    "Joint",
    "PerFrame",
    "Result",
    "Sampling",
    "Settings",
    "SourceCache",
    "TokenFlow",
    "edit_clip",
    "edit_latents",
    "find_correspondences",
    "sample",
]
