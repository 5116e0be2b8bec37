"""The run's folder, whole or not at all."""

from __future__ import annotations

import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from tokenflow.editors import PnP
from tokenflow.engine import Result, Settings
from tokenflow.engine.lightning import run_writer
from tokenflow.engine.lightning.job import ClipSource, Job, Outcome
from tokenflow.engine.lightning.module import Prediction, TokenFlowModule
from tokenflow.engine.lightning.run_writer import RunWriter
from tokenflow.errors import InputError, Preempted
from tokenflow.propagation import NNField
from tokenflow.runs.files import FolderLock
from tokenflow.video import Clip, read_clip

TRAINER = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
MODULE = TokenFlowModule(PnP(), NNField(), cache=None)


@pytest.fixture
def source(tmp_path: Path) -> Job:
    (tmp_path / "in.mp4").touch()
    return Job(ClipSource(tmp_path / "in.mp4"))


@pytest.fixture
def prediction() -> Prediction:
    clip = Clip.from_frames(torch.rand(3, 3, 16, 32))
    edited = Clip.from_frames(torch.rand(3, 3, 16, 32))
    latents = torch.zeros(3, 4, 8, 16)
    return Prediction(
        Result(clip, edited, latents, Settings(seed=4), {"edit": 1.5}), {"device": "cpu"}
    )


def admit(writer: RunWriter, job: Job) -> str | None:
    return writer.admit(TRAINER, MODULE, job)


def write(writer: RunWriter, source: Job, prediction: Prediction) -> None:
    admit(writer, source)
    try:
        writer.write_on_batch_end(TRAINER, MODULE, prediction, [0], source, 0, 0)
    finally:
        writer.on_exception()


def test_the_configuration_is_written_last(
    tmp_path: Path, source: Job, prediction: Prediction, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    writer = RunWriter(str(tmp_path / "runs"))
    monkeypatch.setattr("tokenflow.engine.lightning.run_writer.write_image", fail)
    with pytest.raises(InputError, match=r"No space left on device.*: free some space or choose"):
        write(writer, source, prediction)
    assert not (tmp_path / "runs" / "in" / "run.yaml").exists()
    monkeypatch.undo()
    write(writer, source, prediction)  # an unfinished run is no reason to refuse
    assert (tmp_path / "runs" / "in" / "run.yaml").exists()


def test_a_finished_run_is_refused_before_the_work(
    tmp_path: Path, source: Job, prediction: Prediction
) -> None:
    write(RunWriter(str(tmp_path)), source, prediction)
    with pytest.raises(InputError, match=r"holds a finished run; choose another --output\.folder"):
        admit(RunWriter(str(tmp_path)), source)
    write(RunWriter(str(tmp_path), overwrite=True), source, prediction)


def test_a_run_stands_until_the_one_that_overwrites_it_is_whole(
    tmp_path: Path, source: Job, prediction: Prediction, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    write(RunWriter(str(tmp_path)), source, prediction)
    before = {p.name: p.read_bytes() for p in (tmp_path / "in").iterdir()}
    monkeypatch.setattr("tokenflow.engine.lightning.run_writer.write_image", fail)
    with pytest.raises(InputError, match=r"No space left on device.*: free some space or choose"):
        write(RunWriter(str(tmp_path), overwrite=True), source, prediction)
    assert {p.name: p.read_bytes() for p in (tmp_path / "in").iterdir()} == before


def test_a_clip_with_a_folder_in_its_files_way_is_not_edited(tmp_path: Path, source: Job) -> None:
    (tmp_path / "in" / "report.html").mkdir(parents=True)
    with pytest.raises(InputError, match=r"in cannot be written \(.*report\.html is a folder"):
        admit(RunWriter(str(tmp_path)), source)
    assert [p.name for p in (tmp_path / "in").iterdir()] == ["report.html"]


def test_a_clip_for_which_the_disk_has_no_room_is_not_edited(tmp_path: Path, source: Job) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(InputError, match=r"in cannot be written \(.*choose another --output\."):
            admit(RunWriter(str(tmp_path)), source)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    admit(RunWriter(str(tmp_path)), source)


def test_what_a_killed_run_left_is_removed(
    tmp_path: Path, source: Job, prediction: Prediction
) -> None:
    left = tmp_path / "in" / ".unfinished-a"
    left.mkdir(parents=True)
    (left / "edited.mp4").touch()
    writer = RunWriter(str(tmp_path))
    admit(writer, source)
    assert not left.exists()
    writer.on_exception()


def test_a_run_that_writes_nothing_leaves_no_folder(
    tmp_path: Path, source: Job, prediction: Prediction, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("tokenflow.video.writer.av.open", fail)
    with pytest.raises(InputError, match=r"No space left on device.*: free some space or choose"):
        write(RunWriter(str(tmp_path)), source, prediction)
    assert not (tmp_path / "in").exists()


def test_files_of_the_user_stay(tmp_path: Path, source: Job, prediction: Prediction) -> None:
    (tmp_path / "runs" / "in").mkdir(parents=True)
    (tmp_path / "runs" / "in" / "probe").write_text("mine")
    write(RunWriter(str(tmp_path / "runs")), source, prediction)
    assert (tmp_path / "runs" / "in" / "probe").read_text() == "mine"


def test_a_folder_that_was_only_taken_is_gone_again(tmp_path: Path, source: Job) -> None:
    writer = RunWriter(str(tmp_path / "runs" / "deep"))
    assert admit(writer, source) is None
    assert [p.name for p in (tmp_path / "runs" / "deep" / "in").iterdir()] == [".lock"]
    writer.release()
    assert not (tmp_path / "runs").exists()


def test_two_runs_into_one_folder(tmp_path: Path, source: Job, prediction: Prediction) -> None:
    first, second = RunWriter(str(tmp_path)), RunWriter(str(tmp_path))
    assert admit(first, source) is None
    with pytest.raises(InputError, match=r"another run writes to .* now; wait for it, or choose"):
        admit(second, source)
    listed = Job(source.source, where="clips.yaml, clip 1")
    assert admit(second, listed) == "another run has it now"
    first.write_on_batch_end(TRAINER, MODULE, prediction, [0], source, 0, 0)
    assert admit(second, listed) == "finished before"
    assert sorted(p.name for p in (tmp_path / "in").iterdir()) == [
        "compare.mp4", "contact_sheet.png", "edited.mp4", "report.html", "run.yaml",
    ]  # fmt: skip


def test_a_run_that_another_has_just_finished(
    tmp_path: Path, source: Job, prediction: Prediction, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the question whether it is finished and the lock."""
    taken, listed = FolderLock.taken, Job(source.source, where="clips.yaml, clip 1")

    def late(lock: FolderLock) -> bool:
        (lock.folder).mkdir(parents=True, exist_ok=True)
        (lock.folder / "run.yaml").write_text("theirs")
        return taken(lock)

    monkeypatch.setattr(FolderLock, "taken", late)
    writer = RunWriter(str(tmp_path))
    assert admit(writer, listed) == "finished before"
    writer.write_on_batch_end(TRAINER, MODULE, Outcome(listed, "skipped"), [0], listed, 0, 0)
    assert [p.name for p in (tmp_path / "in").iterdir()] == ["run.yaml"]


def test_a_folder_that_is_not_the_runs_gets_no_note(tmp_path: Path) -> None:
    """As where the output would lie in its source."""
    (tmp_path / "in").mkdir()
    job = Job(ClipSource(tmp_path / "in"), where="clips.yaml, clip 1")
    writer = RunWriter(str(tmp_path))
    with pytest.raises(InputError, match="beside or in its source"):
        admit(writer, job)
    writer.write_on_batch_end(TRAINER, MODULE, Outcome(job, "failed", "it"), [0], job, 0, 0)
    assert not list((tmp_path / "in").iterdir())


def test_a_run_is_whole_without_its_page(
    tmp_path: Path, source: Job, prediction: Prediction, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise KeyError("width")

    write(RunWriter(str(tmp_path)), source, prediction)
    (tmp_path / "in" / "metrics.json").write_text("{}")
    monkeypatch.setattr("tokenflow.engine.lightning.run_writer.write_report", fail)
    with pytest.warns(match=r"report\.html is not written \(KeyError: 'width'\); tokenflow report"):
        write(RunWriter(str(tmp_path), overwrite=True), source, prediction)
    # nothing of the run before is left beside it
    assert sorted(p.name for p in (tmp_path / "in").iterdir()) == [
        "compare.mp4", "contact_sheet.png", "edited.mp4", "run.yaml",
    ]  # fmt: skip


@pytest.mark.parametrize("last", ["write_video", "write_image", "write_report", "staged"])
def test_a_run_that_is_asked_to_stop_while_it_writes(
    last: str, tmp_path: Path, source: Job, prediction: Prediction, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, module = RunWriter(str(tmp_path)), TokenFlowModule(PnP(), NNField(), cache=None)
    admit(writer, source)
    call = getattr(run_writer, last)

    def signalled(*args: Any, **options: Any) -> Any:
        signal.raise_signal(signal.SIGUSR1)
        return call(*args, **options)

    monkeypatch.setattr(run_writer, last, signalled)
    module.preemption.install()
    try:
        with pytest.raises(Preempted):
            writer.write_on_batch_end(TRAINER, module, prediction, [0], source, 0, 0)
    finally:
        module.preemption.close()
    writer.on_exception()
    assert not (tmp_path / "in").exists()


def test_frames_that_the_encoder_refuses(tmp_path: Path, source: Job) -> None:
    clip = Clip.from_frames(torch.rand(2, 3, 16, 20_000))
    wide = Prediction(Result(clip, clip, torch.zeros(2, 4, 8, 8), Settings(), {"edit": 1.5}), {})
    with pytest.raises(InputError, match=r"edited\.mp4 cannot be written \("):
        write(RunWriter(str(tmp_path)), source, wide)
    assert not (tmp_path / "in").exists()


def test_compare_shows_source_and_edit_side_by_side(
    tmp_path: Path, source: Job, prediction: Prediction
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
