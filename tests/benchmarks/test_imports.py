"""Every benchmark can be started; only the scenes' are run in tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
CODE = """
import runpy, sys
for script in sys.argv[1:]:
    runpy.run_path(script, run_name="imported")
"""


@pytest.mark.full
def test_every_script_imports() -> None:
    scripts = sorted(map(str, FOLDER.glob("*.py")))
    assert scripts
    code = f"import sys\nsys.path.insert(0, {str(FOLDER)!r})\n{CODE}"
    done = subprocess.run(  # in a process without the tests' type checker, as users start them
        [sys.executable, "-c", code, *scripts],
        capture_output=True, text=True, cwd=FOLDER.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
