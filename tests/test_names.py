"""Clips whose names are no UTF-8, or hold what a terminal would obey."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tokenflow.cli.main import main
from tokenflow.engine.lightning.job import ClipSource, Job, Outcome
from tokenflow.engine.lightning.run_writer import print_outcomes
from tokenflow.report import read_run
from tokenflow.testing import tiny_clip
from tokenflow.text import printable, printable_lines
from tokenflow.video import read_clip, write_clip


@pytest.mark.parametrize(
    "name", [os.fsdecode(b"caf\xe9"), "a\x1b[2J\nb"], ids=["no UTF-8", "control characters"]
)
def test_a_clip_of_any_name_is_edited(
    name: str, model_folder: Path, tmp_path: Path, cache_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    video = write_clip(tmp_path / "in.mp4", tiny_clip(3)).rename(tmp_path / f"{name}.mp4")
    main([
        "predict", f"--data.video={video}", f"--model.backbone={model_folder}",
        "--model.prompt=a ball", "--model.steps=1", f"--output.folder={tmp_path / 'runs'}",
        "--trainer.accelerator=cpu",
    ])  # fmt: skip
    folder = tmp_path / "runs" / name
    assert len(read_clip(folder / "edited.mp4")) == 3
    assert read_run(folder).came["source"]["video"] == str(video)
    assert printable_lines(name) in (folder / "report.html").read_text("utf-8")
    main(["evaluate", str(folder), "--distances=[1]"])
    main(["report", str(folder)])
    main(["cache", f"--folder={cache_folder}"])
    out, err = capsys.readouterr()
    assert f"{tmp_path}/runs/{printable(name)}/report.html\n" in out
    assert f"{printable(name)}  inversion  3" in out
    assert "\x1b" not in out + err
    (out + err).encode()


def test_outcomes_of_many_clips_are_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    jobs = [Job(ClipSource(Path(f"{name}.mp4"))) for name in ("a\x1b[2J\nb", "caf\udce9")]
    print_outcomes([Outcome(job, "failed", "no\nroom\x07") for job in jobs])
    assert capsys.readouterr().out.splitlines() == [
        r"a\x1b[2J\nb  failed               no\nroom\x07",
        r"caf\xe9      failed               no\nroom\x07",
        "2 clips: 0 done, 0 skipped, 2 failed",
    ]
