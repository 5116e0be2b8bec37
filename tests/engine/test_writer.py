"""The run's folder, whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from tokenflow.engine import Result
from tokenflow.engine.data import ClipSource
from tokenflow.engine.module import Prediction
from tokenflow.engine.writer import RunWriter
from tokenflow.errors import InputError
from tokenflow.video import Clip, read_clip

TRAINER = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
MODULE = LightningModule()


@pytest.fixture
def source(tmp_path: Path) -> ClipSource:
    (tmp_path / "in.mp4").touch()
    return ClipSource(tmp_path / "in.mp4")


@pytest.fixture
def prediction() -> Prediction:
    clip = Clip.from_frames(torch.rand(3, 3, 16, 32))
    edited = Clip.from_frames(torch.rand(3, 3, 16, 32))
    return Prediction(Result(clip, edited, seed=4, seconds={"edit": 1.5}), {"device": "cpu"})


def write(writer: RunWriter, source: ClipSource, prediction: Prediction) -> None:
    writer.on_predict_batch_start(TRAINER, MODULE, source, 0, 0)
    writer.write_on_batch_end(TRAINER, MODULE, prediction, [0], source, 0, 0)


def test_the_configuration_is_written_last(
    tmp_path: Path, source: ClipSource, prediction: Prediction, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    writer = RunWriter(str(tmp_path / "runs"))
    monkeypatch.setattr("tokenflow.engine.writer.write_image", fail)
    with pytest.raises(OSError, match="No space left"):
        write(writer, source, prediction)
    assert not (tmp_path / "runs" / "in" / "run.yaml").exists()
    monkeypatch.undo()
    write(writer, source, prediction)  # an unfinished run is no reason to refuse
    assert (tmp_path / "runs" / "in" / "run.yaml").exists()


def test_a_finished_run_is_refused_before_the_work(
    tmp_path: Path, source: ClipSource, prediction: Prediction
) -> None:
    write(RunWriter(str(tmp_path)), source, prediction)
    with pytest.raises(InputError, match=r"holds a finished run; choose another --output\.folder"):
        RunWriter(str(tmp_path)).on_predict_batch_start(TRAINER, MODULE, source, 0, 0)
    write(RunWriter(str(tmp_path), overwrite=True), source, prediction)


def test_an_overwritten_run_that_fails_is_no_finished_run(
    tmp_path: Path, source: ClipSource, prediction: Prediction, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    write(RunWriter(str(tmp_path)), source, prediction)
    monkeypatch.setattr("tokenflow.engine.writer.write_clip", fail)
    with pytest.raises(OSError, match="No space left"):
        write(RunWriter(str(tmp_path), overwrite=True), source, prediction)
    assert not (tmp_path / "in" / "run.yaml").exists()


def test_a_run_that_writes_nothing_leaves_no_folder(
    tmp_path: Path, source: ClipSource, prediction: Prediction, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("tokenflow.video.writer.av.open", fail)
    with pytest.raises(OSError, match="No space left"):
        write(RunWriter(str(tmp_path)), source, prediction)
    assert not (tmp_path / "in").exists()


def test_files_of_the_user_stay(tmp_path: Path, source: ClipSource, prediction: Prediction) -> None:
    (tmp_path / "runs" / "in").mkdir(parents=True)
    (tmp_path / "runs" / "in" / "probe").write_text("mine")
    write(RunWriter(str(tmp_path / "runs")), source, prediction)
    assert (tmp_path / "runs" / "in" / "probe").read_text() == "mine"


def test_the_check_of_a_folder_makes_none(tmp_path: Path, source: ClipSource) -> None:
    writer = RunWriter(str(tmp_path / "runs" / "deep"))
    writer.on_predict_batch_start(TRAINER, MODULE, source, 0, 0)
    assert not (tmp_path / "runs").exists()


def test_compare_shows_source_and_edit_side_by_side(
    tmp_path: Path, source: ClipSource, prediction: Prediction
) -> None:
    write(RunWriter(str(tmp_path), crf=0), source, prediction)
    both = read_clip(tmp_path / "in" / "compare.mp4").frames
    edited = read_clip(tmp_path / "in" / "edited.mp4").frames
    # the same picture encoded at another place: chroma blocks may straddle the gap
    assert (both[..., -32:] - edited).abs().mean() < 0.02
    assert (both[..., :32] - edited).abs().mean() > 0.1


def test_names_of_clips(tmp_path: Path) -> None:
    (tmp_path / "walk.mov").touch()
    (tmp_path / "walk.frames").mkdir()
    assert ClipSource(tmp_path / "walk.mov").name == "walk"
    assert ClipSource(tmp_path / "walk.frames").name == "walk.frames"
