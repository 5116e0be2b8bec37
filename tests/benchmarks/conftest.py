"""Benchmarks are scripts that import each other by name, as Python finds them beside a script."""

import sys

from tests.conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))
