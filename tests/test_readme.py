"""What the README shows is run, word for word."""

import re
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.test_docs import blocks
from tokenflow.engine import editing
from tokenflow.video import read_clip

README = (ROOT / "README.md").read_text()


def test_five_lines_from_file_to_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = blocks("README.md", "python")
    assert len([line for line in code.splitlines() if line]) == 5
    # the lines are the README's own; only the clip's length and the steps are cut
    quick = editing.Settings(steps=2)
    monkeypatch.setattr(editing, "Settings", lambda: quick)
    source = ROOT / "tokenflow/miniature/demo/blue_ball.mp4"
    code = code.replace('"tokenflow/miniature/demo/blue_ball.mp4", ', f'"{source}", max_frames=3, ')
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert read_clip(tmp_path / "edited.mp4").frames.shape == (3, 3, 128, 128)


def test_its_commands_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert f"\n{target}:" in makefile, target
    for config in re.findall(r"--config (\S+)", README):
        assert (ROOT / config).exists(), config
