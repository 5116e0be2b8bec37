"""An editable installation, as `pip install --editable` leaves it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from setuptools import build_meta

from tests.conftest import ROOT


def test_a_clone_does_not_shadow_its_editable_installation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the folder that holds the clone, `tokenflow` is the package, not the clone's folder."""
    clone, site = tmp_path / "tokenflow", tmp_path / "site"
    clone.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        (clone / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "tokenflow" / "video", clone / "tokenflow" / "video")
    shutil.copy(ROOT / "tokenflow" / "__init__.py", clone / "tokenflow")
    with monkeypatch.context() as there:
        there.chdir(clone)
        wheel = tmp_path / build_meta.build_editable(str(tmp_path))
    with zipfile.ZipFile(wheel) as files:
        files.extractall(site)
    # site-packages of its own comes before those that hold the tests' installation
    asked = f"import site; site.addsitedir({str(site)!r}); import tokenflow; print(tokenflow)"
    command = [sys.executable, "-S", "-c", asked]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert f"'{clone / 'tokenflow' / '__init__.py'}'" in done.stdout
