"""`tokenflow report` as users meet it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tests.report.making import make_run
from tokenflow.cli import main


def refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The command ends with code 2 and says why."""
    with pytest.raises(SystemExit) as exit:
        main(["report", *words])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def without_videos(page: str) -> str:
    """On a busy machine x264 now and then spends its bits otherwise."""
    return re.sub(r"data:video/mp4;base64,[\w+/=]+", "a video", page)


def test_a_page_is_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "bar")
    page = folder / "report.html"
    before = page.read_text()
    page.unlink()
    capsys.readouterr()
    main(["report", str(folder)])
    assert capsys.readouterr().out == f"{page}\n"
    assert without_videos(page.read_text()) == without_videos(before)
    main(["report", str(folder), "--output", str(tmp_path / "there" / "page.html")])
    there = (tmp_path / "there" / "page.html").read_text()
    assert without_videos(there) == without_videos(before)


def test_what_is_wrong_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = str(make_run(tmp_path / "one")), str(make_run(tmp_path / "two"))
    refused([str(tmp_path)], "expected a finished run's folder", capsys)
    refused([one, two], "expected --output PAGE.html for the page of several runs", capsys)
    refused([one, two, "--features", "--output=a.html"], "--features is for one run, got 2", capsys)
    refused([one, "--output=edited.mp4"], "expected a name that ends in .html", capsys)
    refused([one, "--site=x"], "--site, --step and --frame are of --features", capsys)
    refused([one, "--step", "x"], "see tokenflow report --help", capsys)
    refused([], "see tokenflow report --help", capsys)


@pytest.mark.parametrize(
    "run", [[1], {"seconds": 3}, {"seconds": {"edit": "x"}}, {"allow_imports": "os"}]
)
def test_a_record_that_was_changed_by_hand(
    run: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(tmp_path / "bar")
    record = yaml.safe_load((folder / "run.yaml").read_text())
    (folder / "run.yaml").write_text(yaml.safe_dump(record | {"run": run}))
    refused([str(folder)], "was changed by hand and cannot be used", capsys)


def test_several_runs_on_one_page(tmp_path: Path) -> None:
    folders = [str(make_run(tmp_path / name)) for name in ("one", "two")]
    main(["report", *folders, "--output", str(tmp_path / "page.html")])
    assert "2 runs" in (tmp_path / "page.html").read_text()
