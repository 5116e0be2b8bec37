"""The example package stays one that is read in a few minutes."""

import ast
from pathlib import Path

import pytest

from tests.conftest import ROOT


def lines_of_code(file: Path) -> int:
    """Those that are neither blank nor of a comment or docstring."""
    text = file.read_text()
    strings = [
        range(node.lineno, (node.end_lineno or node.lineno) + 1)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    ]
    lines = [
        line.strip()
        for number, line in enumerate(text.splitlines(), start=1)
        if not any(number in string for string in strings)
    ]
    return sum(line != "" and not line.startswith("#") for line in lines)


def test_lines_are_counted_without_docstrings(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text('"""One\n\ntwo."""\n\n# three\nx = 1  # four\ny = """\n"""\n')
    assert lines_of_code(tmp_path / "a.py") == 3


@pytest.mark.parametrize("module", ["editor", "kernel"])
def test_a_plugin_has_under_fifty_lines_of_code(module: str) -> None:
    file = ROOT / "examples/tokenflow-local/tokenflow_local" / f"{module}.py"
    assert 0 < lines_of_code(file) < 50
