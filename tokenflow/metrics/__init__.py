"""Measures of an edited video."""

from tokenflow.metrics.functional import decibels, psnr, warp_error

__all__ = ["decibels", "psnr", "warp_error"]
