"""Measures of an edited video."""

from tokenflow.metrics.functional import psnr, warp_error

__all__ = ["psnr", "warp_error"]
