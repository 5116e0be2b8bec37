"""Measures of an edited video: pure functions, and `Measures`, which chooses among them."""

from tokenflow.metrics.clip_score import ClipEmbedder, frame_consistency, text_alignment
from tokenflow.metrics.fidelity import decibels, psnr, ssim
from tokenflow.metrics.flicker import flicker
from tokenflow.metrics.judge_accuracy import Verdict, judge_accuracy, judge_edit
from tokenflow.metrics.long_range import LongRangeError, long_range
from tokenflow.metrics.measures import Measures
from tokenflow.metrics.perceptual import load_lpips, lpips
from tokenflow.metrics.structure import structure
from tokenflow.metrics.visibility import VisibleFlow, visible, visible_flow
from tokenflow.metrics.warp_error import warp_error

__all__ = [
    "ClipEmbedder",
    "LongRangeError",
    "Measures",
    "Verdict",
    "VisibleFlow",
    "decibels",
    "flicker",
    "frame_consistency",
    "judge_accuracy",
    "judge_edit",
    "load_lpips",
    "long_range",
    "lpips",
    "psnr",
    "ssim",
    "structure",
    "text_alignment",
    "visible",
    "visible_flow",
    "warp_error",
]
