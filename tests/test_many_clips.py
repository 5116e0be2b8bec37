"""Many clips as one job: what is finished is skipped, what fails does not stop the rest."""

from __future__ import annotations

import gc
import shutil
import subprocess
import sys
import weakref
from errno import ENOSPC
from os import strerror
from pathlib import Path
from signal import SIGPIPE
from subprocess import PIPE
from typing import Any

import pytest
import torch
import yaml
from torch import OutOfMemoryError

from tests.on_ranks import command, ended, launched
from tokenflow.cli.main import main
from tokenflow.editors import Editor, PnP
from tokenflow.engine.lightning.job import Job
from tokenflow.engine.lightning.module import Prediction, TokenFlowModule
from tokenflow.errors import PluginError
from tokenflow.video import Clip, read_clip, write_clip, write_video

NAMES = ("one", "two", "three")
FILES = [
    "compare.mp4", "contact_sheet.png", "edited.mp4", "features.json", "report.html", "run.yaml",
]  # fmt: skip


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Four clips, of which the second is no video."""
    ramp = torch.linspace(0, 1, 32)
    for number, name in enumerate(NAMES):
        levels = ramp + number / 3
        frames = torch.stack([((levels + i / 12) % 1).expand(3, 16, 32) for i in range(5)])
        write_clip(tmp_path / f"{name}.mp4", Clip.from_frames(frames))
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    rows = [
        {"video": "one.mp4", "prompt": "a red ball"},
        {"video": "broken.mp4", "prompt": "a ball"},
        {"video": "two.mp4", "seed": 5, "max_frames": 4},
        {"video": "three.mp4", "name": "third"},
    ]
    path = tmp_path / "clips.yaml"
    path.write_text(yaml.safe_dump(rows))
    return path


@pytest.fixture
def words(manifest: Path, model_folder: Path, tmp_path: Path) -> list[str]:
    return [
        "predict", f"--data.manifest={manifest}", f"--model.backbone={model_folder}",
        "--model.prompt=a ball", "--model.steps=2", "--model.keyframe_every=2",
        f"--output.folder={tmp_path / 'runs'}", "--output.crf=0", "--trainer.accelerator=cpu",
    ]  # fmt: skip


def files(folder: Path) -> dict[str, list[str]]:
    return {p.name: sorted(file.name for file in p.iterdir()) for p in folder.iterdir()}


def test_a_clip_that_cannot_be_written_is_not_logged_and_does_not_stop_the_rest(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = tmp_path / "runs"

    def full(path: Path, *args: Any, **options: Any) -> None:
        if "one" in path.parts:
            raise OSError(ENOSPC, strerror(ENOSPC))
        write_video(path, *args, **options)

    monkeypatch.setattr("tokenflow.engine.lightning.run_writer.write_video", full)
    logger = f"{{class_path: CSVLogger, init_args: {{save_dir: {tmp_path}}}}}"
    with pytest.raises(SystemExit) as exit:
        main([*words, f"--trainer.logger={logger}"])
    assert exit.value.code == 1
    assert (files(runs)["two"], files(runs)["third"]) == (FILES, FILES)
    reason = yaml.safe_load((runs / "one" / "failed.yaml").read_text())["failed"]
    assert "cannot be written" in reason
    [logged] = tmp_path.glob("lightning_logs/version_0/metrics.csv")
    assert "two/seconds/edit" in logged.read_text()
    assert "one/seconds/edit" not in logged.read_text()


def test_a_part_without_clips_says_so(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*words, "--data.part=5/5"])
    err = capsys.readouterr().err
    assert "part 5/5 of the 4 clips of " in err
    assert "DataLoader" not in err
    assert not (tmp_path / "runs").exists()


def test_a_result_does_not_outlive_its_clip(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    results: list[weakref.ref[Any]] = []
    alive: list[int] = []
    edited = TokenFlowModule.edited

    def counted(self: TokenFlowModule, job: Job) -> Prediction:
        gc.collect()
        alive.append(sum(result() is not None for result in results))
        prediction = edited(self, job)
        results.append(weakref.ref(prediction.result.clip.frames))
        return prediction

    monkeypatch.setattr(TokenFlowModule, "edited", counted)
    with pytest.raises(SystemExit):
        main(words)
    assert (len(results), alive) == (3, [0] * 4)


def test_what_a_failed_clip_had_in_memory_is_freed(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[weakref.ref[Any]] = []
    alive: list[int] = []

    def fails(self: PnP, *_: Any, **__: Any) -> None:
        gc.collect()
        alive.append(sum(it() is not None for it in left))
        features = torch.rand(3)
        left.append(weakref.ref(features))
        raise PluginError("no correspondence") from OutOfMemoryError("none left")

    monkeypatch.setattr(PnP, "advance", fails)
    with pytest.raises(SystemExit):
        main(words)
    assert (len(left), alive) == (3, [0] * 3)


def test_a_clip_that_fails_does_not_stop_the_rest(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    with pytest.raises(SystemExit) as exit:
        main(words)
    assert exit.value.code == 1
    assert files(runs) == {"one": FILES, "two": FILES, "third": FILES, "broken": ["failed.yaml"]}
    reason = yaml.safe_load((runs / "broken" / "failed.yaml").read_text())["failed"]
    assert "broken.mp4" in reason
    lines = capsys.readouterr().out.splitlines()[-5:]
    assert [line.split()[:2] for line in lines[:4]] == [
        ["one", "done"], ["broken", "failed"], ["two", "done"], ["third", "done"]
    ]  # fmt: skip
    assert "broken.mp4" in lines[1]
    assert lines[4] == "4 clips: 3 done, 0 skipped, 1 failed"
    record = yaml.safe_load((runs / "two" / "run.yaml").read_text())["run"]
    assert (record["seed"], record["frames"], record["prompt"]) == (5, 4, "a ball")
    assert yaml.safe_load((runs / "one" / "run.yaml").read_text())["run"]["prompt"] == "a red ball"

    # mended, only the one is edited
    (tmp_path / "broken.mp4").write_bytes((tmp_path / "one.mp4").read_bytes())
    before = (runs / "one" / "run.yaml").stat().st_mtime_ns
    main(words)
    assert files(runs)["broken"] == FILES
    assert (runs / "one" / "run.yaml").stat().st_mtime_ns == before
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == "4 clips: 1 done, 3 skipped, 0 failed"
    assert [line for line in err.splitlines() if line.startswith("clip")] == ["clip 2/4, broken"]

    # one that failed where an older result lies is tried again
    (tmp_path / "broken.mp4").rename(tmp_path / "gone.mp4")
    with pytest.raises(SystemExit):
        main([*words, "--output.overwrite=true"])
    assert files(runs)["broken"] == sorted([*FILES, "failed.yaml"])
    (tmp_path / "gone.mp4").rename(tmp_path / "broken.mp4")
    main(words)
    assert files(runs)["broken"] == FILES
    assert capsys.readouterr().out.splitlines()[-1] == "4 clips: 1 done, 3 skipped, 0 failed"


@pytest.mark.full
def test_a_closed_pipe_does_not_stop_the_rest(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "broken.mp4").write_bytes((tmp_path / "one.mp4").read_bytes())
    line = [sys.executable, "-m", "tokenflow.cli.main", *words]
    process = subprocess.Popen(line, stdout=PIPE, stderr=PIPE, text=True)
    assert process.stdout is not None
    process.stdout.close()
    _, err = process.communicate()
    assert files(tmp_path / "runs") == dict.fromkeys(("one", "two", "third", "broken"), FILES)
    assert "Traceback" not in err
    assert process.returncode == 128 + SIGPIPE


def test_a_clip_that_cannot_be_written_does_not_stop_the_rest(
    words: list[str], manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    runs, stages = tmp_path / "runs", []
    rows = yaml.safe_load(manifest.read_text())
    manifest.write_text(yaml.safe_dump([row for row in rows if row["video"] != "broken.mp4"]))
    runs.mkdir()
    (runs / "third").write_text("a file, where a folder is to be")

    def failing(path: Path, *args: Any, **options: Any) -> None:
        if "one" in path.parts:
            raise ValueError("no such pixel format")
        write_video(path, *args, **options)

    monkeypatch.setattr("tokenflow.engine.lightning.run_writer.write_video", failing)
    with pytest.raises(SystemExit) as exit:
        main([*words, f"--model.cache={tmp_path / 'cache'}"])
    assert exit.value.code == 1
    assert [p.name for p in (runs / "one").iterdir()] == ["failed.yaml"]
    lines = capsys.readouterr().out.splitlines()[-4:]
    assert "one    failed" in lines[0]
    assert "no such pixel format" in lines[0]
    assert "third cannot be written" in lines[2]
    assert lines[3] == "3 clips: 1 done, 0 skipped, 2 failed"

    # mended, the one is only written, and the other edited
    (runs / "third").unlink()
    monkeypatch.undo()
    advance = Editor.advance

    def counting(self: Editor, x: torch.Tensor, *args: Any) -> torch.Tensor:
        stages.append(len(x))
        return advance(self, x, *args)

    monkeypatch.setattr(Editor, "advance", counting)
    main([*words, f"--model.cache={tmp_path / 'cache'}"])
    written = [name for name in FILES if name != "features.json"]  # nothing was sampled
    assert files(runs) == {"one": written, "two": FILES, "third": FILES}
    # two steps of the third's: three keyframes, two other frames, and the fused keyframes
    assert stages == 2 * [3, 2, 3]


def test_parts_of_a_manifest(words: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main([*words, "--data.part=2/3"])
    assert set(files(tmp_path / "runs")) == {"broken"}
    main([*words, "--data.part=1/3"])
    assert set(files(tmp_path / "runs")) == {"broken", "one", "third"}
    main([*words, "--data.part=9/9"])  # none is left for it


def test_a_row_that_no_clip_can_be_edited_with_is_refused_at_once(
    words: list[str], manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest.write_text("- {video: one.mp4}\n- {video: two.mp4, steps: 0}\n")
    with pytest.raises(SystemExit) as exit:
        main(words)
    assert exit.value.code == 2
    assert "clips.yaml, clip 2: steps must be at least 1, got 0" in capsys.readouterr().err
    manifest.write_text("- {video: one.mp4, prompt: ' '}\n")
    with pytest.raises(SystemExit):
        main(words)
    assert "clips.yaml, clip 1: the prompt is empty" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def alone(words: list[str], tmp_path: Path) -> Path:
    """What one process makes of the clips."""
    folder = tmp_path / "alone"
    options = [f"--output.folder={folder}", "--model.cache=null", "--trainer.accelerator=cpu"]
    assert ended([command([*words, *options], {}, None)]) == [1]
    return folder


def test_two_groups_of_ranks_share_the_clips(words: list[str], alone: Path, tmp_path: Path) -> None:
    runs, told = tmp_path / "runs", tmp_path / "told"
    codes = ended(launched(2, [*words, "--model.ranks_per_clip=1"], told))
    assert codes == [1, 0], told.read_text()  # the first one knows of all
    assert files(runs) == {"one": FILES, "two": FILES, "third": FILES, "broken": ["failed.yaml"]}
    reason = yaml.safe_load((runs / "broken" / "failed.yaml").read_text())["failed"]
    assert "broken.mp4" in reason
    lines = told.read_text().splitlines()
    assert lines.count("4 clips: 3 done, 0 skipped, 1 failed") == 1  # only one rank prints
    written = {Path(line).parent.name for line in lines if line.endswith("report.html")}
    assert written == {"one", "two"}  # of the clips that its group edits
    for name in ("one", "two", "third"):
        require_near(runs / name, alone / name)


def require_near(run: Path, other: Path) -> None:
    """Two runs differ by rounding."""
    here, there = (read_clip(folder / "edited.mp4") for folder in (run, other))
    # a level of rounding in each of Y, U and V: B = Y + 1.77 U is then off by up to 3
    difference = (here.frames - there.frames).abs()
    assert float(difference.max()) <= 3.5 / 255
    assert float(difference.mean()) <= 0.02 / 255


def test_a_failure_on_one_of_the_ranks_that_share_a_clip_does_not_stop_the_rest(
    words: list[str], manifest: Path, alone: Path, tmp_path: Path
) -> None:
    rows = [row | {"max_frames": 4} for row in yaml.safe_load(manifest.read_text())[:3]]
    for name in ("error", "nan", "pass"):
        shutil.copy(tmp_path / "one.mp4", tmp_path / f"{name}.mp4")
    rows[1:1] = [{"video": "error.mp4"}, {"video": "nan.mp4"}]
    manifest.write_text(yaml.safe_dump(rows))
    words = [*words, "--allow_imports=tests", "--model.editor=tests.killing.Fragile"]
    words += ["--model.fusion=0.8"]  # as the default of PnP, whose step is not its own
    runs, told = tmp_path / "runs", tmp_path / "told"
    assert ended(launched(2, words, told)) == [1, 0], told.read_text()
    why = {"error": "ValueError: not this clip", "nan": "NaN", "broken": "broken.mp4"}
    failed = {name: ["failed.yaml"] for name in why}
    assert files(runs) == {"one": FILES, "two": FILES, **failed}
    for name, reason in why.items():
        assert reason in yaml.safe_load((runs / name / "failed.yaml").read_text())["failed"]
    require_near(runs / "two", alone / "two")

    # inside a pass the ranks cannot agree on it, and the job ends
    manifest.write_text(yaml.safe_dump([{"video": "pass.mp4"}, *rows]))
    assert not {0, None} & set(ended(launched(2, words, told)))
    assert not (runs / "pass" / "run.yaml").exists()


def test_groups_that_do_not_fit_the_ranks(words: list[str], tmp_path: Path) -> None:
    told = tmp_path / "told"
    codes = ended(launched(2, [*words, "--model.ranks_per_clip=3"], told))
    assert codes == [2, 2]
    assert "to divide 2, the job's ranks; got 3" in told.read_text()
