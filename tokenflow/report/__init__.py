"""The page that a run leaves: to look at, offline, in any browser."""

from tokenflow.report.features import draw, draw_correspondences
from tokenflow.report.page import write_comparison, write_report
from tokenflow.runs.record import Run, read_run, record_text

__all__ = [
    "Run",
    "draw",
    "draw_correspondences",
    "read_run",
    "record_text",
    "write_comparison",
    "write_report",
]
