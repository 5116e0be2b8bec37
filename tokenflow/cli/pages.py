"""The pages that `tokenflow report` writes: a run's, or that of several runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import Namespace

from tokenflow.errors import InputError, explained
from tokenflow.plugins import OPTION
from tokenflow.report import (
    Features,
    Run,
    draw,
    read_run,
    require_shown,
    write_comparison,
    write_report,
)
from tokenflow.text import printable


def single(options: Namespace, allowed: list[str], output: Path | None) -> None:
    """Writes the page of one run.

    Raises:
        InputError: The folder holds no finished run, or its files cannot be read.
    """
    one = read_run(options.runs[0])
    features = observed(one, options, allowed) if options.features else None
    try:
        print(printable(write_report(one, output, features)))
    except InputError:
        raise
    except Exception as error:  # whatever somebody has written into its files
        raise InputError(f"{one.folder} is not shown: {explained(error)}") from error


def several(folders: Sequence[str], output: Path) -> None:
    """Writes the page of several runs, without those that cannot be shown.

    Raises:
        InputError: Some cannot, which the message names; the page of the others is written.
    """
    runs, failed = [], []
    for folder in folders:
        try:
            run = read_run(folder)
            require_shown(run)
            runs.append(run)
        except Exception as error:  # whatever is wrong with one, the others are shown
            failed.append(f"{folder} is not shown: {explained(error)}")
    if runs:
        print(printable(write_comparison(runs, output)))
    if failed:
        raise InputError("\n".join(failed))


def observed(run: Run, options: Namespace, allowed: list[str]) -> Features:
    """The pictures of the run's features that the options ask for."""
    from tokenflow.cli.probe import observe  # late: diffusers is imported with it

    source, frame = run.source().frames, options.frame
    if frame is not None and not 0 <= frame < len(source):
        raise InputError(f"expected a frame from 0 to {len(source) - 1}, got {frame}")
    words = [word for name in allowed for word in (OPTION, name)]
    return draw(observe(run, options.site, options.step, frame, words), source, frame)
