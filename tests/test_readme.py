"""The README's Python is run; it names every command."""

import re
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.test_docs import blocks
from tokenflow import Settings
from tokenflow.cli.main import COMMANDS
from tokenflow.video import read_clip

README = (ROOT / "README.md").read_text()


def test_five_lines_from_file_to_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = blocks("README.md", "python")
    assert len([line for line in code.splitlines() if line]) == 5
    # the lines are the README's own; only the clip's length and the steps are cut
    source = ROOT / "tokenflow/miniature/demo/blue_ball.mp4"
    for own, quick in (
        ('"tokenflow/miniature/demo/blue_ball.mp4", ', f'"{source}", max_frames=3, '),
        ("NNField())", "NNField(), Settings(steps=2))"),
    ):
        assert own in code
        code = code.replace(own, quick)
    monkeypatch.chdir(tmp_path)
    exec(code, {"Settings": Settings})
    assert read_clip(tmp_path / "edited.mp4").frames.shape == (3, 3, 128, 128)


def test_it_names_every_command() -> None:
    assert re.findall(r"^make (\w+)", README, re.MULTILINE) == ["demo", "test", "app"]
    assert set(re.findall(r"(?:^|`)tokenflow (\w+)", README, re.MULTILINE)) == set(COMMANDS)
