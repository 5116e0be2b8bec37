"""The progress of counted work, on stderr: how far, how fast, and when it ends."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from tokenflow.text import printable


class Reporter:
    """Bars on a terminal; elsewhere, and in a SLURM job, lines.

    Args:
        interval: Seconds between two lines of steps.
        clock: The time in seconds.

    Attributes:
        bars: A context manager that shows the bars.
    """

    def __init__(self, interval: float = 15.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.interval, self.clock = interval, clock
        self.printed = -interval
        self.began: dict[str, tuple[float, int]] = {}  # when, and after how many
        self.tasks: dict[str, TaskID] = {}
        terminal = sys.stderr.isatty() and "SLURM_JOB_ID" not in os.environ
        self.bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[pace]}"),
            console=Console(stderr=True),
            disable=not terminal,
        )

    def item(self, verb: str, name: str, number: int, items: int) -> None:
        """The next of several items begins, from number 1."""
        pace = self.pace(verb, number - 1, items - number + 1)
        self.bar(verb, f"{verb} {printable(name)}", number - 1, items, pace)
        self.line(f"{verb} {number}/{items}", name, pace)

    def step(self, stage: str, step: int, steps: int, more: float = 0.0) -> None:
        """So many steps of a stage are done; `more` are those of the edit that follows."""
        pace = self.pace(stage, step, steps - step + more)
        if pace and more:
            pace += " including the edit"
        self.bar(stage, stage, step, steps, pace)
        now = self.clock()
        if step == steps or now - self.printed >= self.interval:
            self.printed = now
            self.line(f"{stage}: {step}/{steps}", pace)

    def forget(self, *kept: str) -> None:
        """Removes all stages and items but these."""
        for name in self.began.keys() - set(kept):
            del self.began[name]
            self.bars.remove_task(self.tasks.pop(name))

    def complete(self, name: str) -> None:
        """A stage, or all items, are done."""
        for task in self.bars.tasks:
            if task.id == self.tasks.get(name):
                self.bars.update(task.id, completed=task.total, pace="")

    def pace(self, name: str, done: int, left: int | float) -> str:
        """The mean time of a step and the ETA; nothing before a second one is done."""
        now = self.clock()
        # how long the first one took is not known; a run that is resumed does not begin at 1
        began, first = self.began.setdefault(name, (now, done))
        if done == first:
            return ""
        each = (now - began) / (done - first)
        rate = f"{each:.1f} s each" if each >= 1 or not each else f"{1 / each:.1f} a second"
        return f"{rate}, ETA {timedelta(seconds=round(each * left))}"

    def bar(self, name: str, text: str, done: int, total: int, pace: str) -> None:
        """Draws a bar."""
        if name not in self.tasks:
            self.tasks[name] = self.bars.add_task("", total=total, pace="")
        self.bars.update(self.tasks[name], description=text, completed=done, total=total, pace=pace)

    def line(self, *parts: str) -> None:
        """Prints the parts that are not empty, where there are no bars."""
        if self.bars.disable:
            with suppress(OSError):  # stderr is closed; the work continues
                print(printable(", ".join(filter(None, parts))), file=sys.stderr, flush=True)
