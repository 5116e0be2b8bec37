"""`tokenflow report` as users meet it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml

from tests.report.making import make_run
from tokenflow.cli.main import main
from tokenflow.video import Clip, write_clip


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


BOMB = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{f'*a{n - 1}, ' * 9}]\n" for n in range(1, 12))
RECORDS = {
    "an alias bomb": BOMB,
    "a circle": "run: &a {prompt: *a}",
    "too deep": "run: " + "[" * 5000 + "]" * 5000,
    "too large a number": f"run: {{seconds: {{edit: {'9' * 400}}}}}",
    "no text": "run: \udcff",
}


@pytest.mark.parametrize("what", RECORDS)
def test_a_record_that_is_none_costs_no_other_run_its_place(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, bad = make_run(tmp_path / "one", frames=3), tmp_path / "bad"
    bad.mkdir()
    (bad / "run.yaml").write_text(RECORDS[what], errors="surrogateescape")
    page = tmp_path / "page.html"
    refused([str(bad)], f"{bad / 'run.yaml'} ", capsys)
    refused([str(bad), str(one), f"--output={page}"], f"{bad} is not shown: ", capsys)
    assert "1 runs" in page.read_text()


@pytest.mark.parametrize(
    "text", ['{"metrics": {"a": ' + "9" * 400 + "}}", "[" * 100_000, "\udcff", None]
)
def test_metrics_that_are_none(
    text: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, bad = (make_run(tmp_path / name, frames=3) for name in ("one", "bad"))
    if text is None:
        (bad / "metrics.json").mkdir()
    else:
        (bad / "metrics.json").write_text(text, errors="surrogateescape")
    page = tmp_path / "page.html"
    refused([str(bad), str(one), f"--output={page}"], f"{bad} is not shown: ", capsys)
    assert "1 runs" in page.read_text()


def test_videos_of_another_size_than_the_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, bad = (make_run(tmp_path / name, frames=3) for name in ("one", "bad"))
    write_clip(bad / "edited.mp4", Clip.from_frames(torch.rand(3, 3, 48, 32)))
    message = "3 frames of 64x48 there and 3 frames of 32x48 here; edit again"
    refused([str(bad)], message, capsys)
    page = tmp_path / "page.html"
    refused([str(one), str(bad), f"--output={page}"], message, capsys)
    assert page.exists()


@pytest.mark.parametrize("values", [{"prompt": [1]}, {"source": 3}, {"consistency": {}}])
def test_a_page_of_what_was_changed_by_hand(values: dict[str, object], tmp_path: Path) -> None:
    one, two = (make_run(tmp_path / name, frames=3) for name in ("one", "two"))
    record = yaml.safe_load((two / "run.yaml").read_text())
    record["run"] |= values
    (two / "run.yaml").write_text(yaml.safe_dump(record))
    main(["report", str(two)])
    main(["report", str(one), str(two), f"--output={tmp_path / 'page.html'}"])
    assert "2 runs" in (tmp_path / "page.html").read_text()
