"""What has been measured: a file of JSON lines, one for each clip and row."""

from __future__ import annotations

import json
import subprocess
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.scenes.rows import Plan
from benchmarks.scenes.suite import Case

Record = dict[str, Any]


def key_of(case: Case, row: str, plan: Plan) -> Record:
    """The identity of a measurement, which does not include the code's version."""
    return {"case": asdict(case), "row": row, "plan": asdict(plan)}


@dataclass(frozen=True)
class Results:
    """The records of a file, which need not exist yet; new ones are `by` this version."""

    file: Path
    by: str

    def records(self, plan: Plan) -> list[Record]:
        """A plan's, one for each clip and row, though two processes may have measured it.

        A line that a killed process has not finished counts for nothing.
        """
        found: dict[str, Record] = {}
        for line in self.file.read_text().splitlines() if self.file.exists() else ():
            with suppress(json.JSONDecodeError):
                record = json.loads(line)
                found.setdefault(
                    json.dumps([record["case"], record["row"], record["plan"]]), record
                )
        return [record for record in found.values() if record["plan"] == asdict(plan)]

    def missing(self, case: Case, rows: tuple[str, ...], plan: Plan) -> list[str]:
        """Those rows that a clip has no record of."""
        done = [{k: record[k] for k in ("case", "row", "plan")} for record in self.records(plan)]
        return [row for row in rows if key_of(case, row, plan) not in done]

    def add(self, case: Case, row: str, plan: Plan, measured: Record) -> None:
        """Appends one record."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        record = {**key_of(case, row, plan), "commit": self.by, **measured}
        with self.file.open("a") as file:
            # on a line of its own, whatever is left of a killed process's
            file.write("\n" + json.dumps(record) + "\n")


def commit() -> str:
    """The checkout's commit, with a + where it has changes; "unknown" outside of one."""
    folder = Path(__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    changed = "+" if git("status", "--porcelain", "--untracked-files=no") else ""
    return (git("rev-parse", "--short=10", "HEAD") or "unknown") + changed
