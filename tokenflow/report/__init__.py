"""The page that a run leaves: to look at, offline, in any browser."""

from tokenflow.report.features import Features, draw, draw_correspondences
from tokenflow.report.page import write_comparison, write_report
from tokenflow.runs.record import Run, read_run, record_text, require_shown

__all__ = [
    "Features",
    "Run",
    "draw",
    "draw_correspondences",
    "read_run",
    "record_text",
    "require_shown",
    "write_comparison",
    "write_report",
]
