"""Measures of an edited video: pure functions, and metrics that many processes share."""

from tokenflow.metrics.clip_score import (
    ClipEmbedder,
    FrameConsistency,
    TextAlignment,
    frame_consistency,
    text_alignment,
)
from tokenflow.metrics.fidelity import SSIM, decibels, psnr, ssim
from tokenflow.metrics.flicker import Flicker, flicker
from tokenflow.metrics.judge import JudgeAccuracy, shown
from tokenflow.metrics.long_range import Consistency, long_range
from tokenflow.metrics.measures import Measures
from tokenflow.metrics.motion import Motions, visible
from tokenflow.metrics.perceptual import LPIPS, load_lpips, lpips
from tokenflow.metrics.preservation import Preservation, preservation
from tokenflow.metrics.structure import Structure, structure
from tokenflow.metrics.warp_error import WarpError, warp_error

__all__ = [
    "LPIPS",
    "SSIM",
    "ClipEmbedder",
    "Consistency",
    "Flicker",
    "FrameConsistency",
    "JudgeAccuracy",
    "Measures",
    "Motions",
    "Preservation",
    "Structure",
    "TextAlignment",
    "WarpError",
    "decibels",
    "flicker",
    "frame_consistency",
    "load_lpips",
    "long_range",
    "lpips",
    "preservation",
    "psnr",
    "shown",
    "ssim",
    "structure",
    "text_alignment",
    "visible",
    "warp_error",
]
