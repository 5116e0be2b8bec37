"""Processes that are killed or asked to stop, and the same command once more."""

from __future__ import annotations

import os
import signal
from collections import Counter
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
import yaml

from tests.on_ranks import PATIENCE, command, ended, launched
from tokenflow.testing import tiny_clip
from tokenflow.video import Clip, read_clip, write_clip

KILL, TERM, USR1 = signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1
EDIT = ["--model.prompt=a ball", "--model.keyframe_every=2", "--output.crf=0"]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of two clips with the same frames in another order."""
    folder, rows = tmp_path_factory.mktemp("clips"), []
    for name in ("one", "two"):
        frames = tiny_clip(6).frames if name == "one" else tiny_clip(6).frames.flip(0)
        write_clip(folder / f"{name}.mp4", Clip.from_frames(frames))
        rows.append({"video": f"{name}.mp4"})
    path = folder / "clips.yaml"
    path.write_text(yaml.safe_dump(rows))
    return path


class Job:
    """One command that is started over and over."""

    def __init__(self, folder: Path, clips: Path, model: Path, *words: str) -> None:
        self.folder, self.runs, self.steps = folder, folder / "runs", Counter[str]()
        folder.mkdir(exist_ok=True)
        self.words = [
            "predict", f"--data.manifest={clips}", f"--model.backbone={model}", *EDIT,
            "--model.steps=6", "--model.save_every=2", f"--model.cache={folder / 'cache'}",
            f"--output.folder={self.runs}", "--allow_imports=tests", *words,
        ]  # fmt: skip

    def start(
        self, *kills: tuple[str, int, int], slow: str = "", ranks: int = 2, slurm: bool = False
    ) -> list[int | None]:
        """The ranks' exit codes, where at moments some get signals.

        `slow` names what takes a minute on which rank, as "write 0". Afterwards `steps` are those
        of rank 0. A rank that a request to stop does not end has no exit code, or that of an error.
        """
        steps = self.folder / "steps"
        steps.write_text("")
        words = ["--trainer.callbacks+=tests.killing.Noting", f"--trainer.callbacks.file={steps}"]
        for moment, rank, number in kills:
            words += ["--trainer.callbacks+=tests.killing.KillAt"]
            options = {"moment": moment, "rank": rank, "sent": int(number)}
            words += [f"--trainer.callbacks.{name}={value}" for name, value in options.items()]
        if slow:
            what, rank = slow.split()
            words += ["--trainer.callbacks+=tests.killing.Slow"]
            words += [f"--trainer.callbacks.what={what}", f"--trainer.callbacks.rank={rank}"]
        codes = ended(launched(ranks, [*self.words, *words], self.folder / "said", slurm))
        self.steps = Counter(steps.read_text().split())
        return codes

    @property
    def done(self) -> list[str]:
        """The finished runs; no other has a file in its folder."""
        names = sorted(path.parent.name for path in self.runs.glob("*/run.yaml"))
        assert sorted(path.parent.name for path in self.runs.glob("*/edited.mp4")) == names
        return names

    def frames(self) -> list[torch.Tensor]:
        return [read_clip(self.runs / name / "edited.mp4").frames for name in ("one", "two")]


@pytest.mark.full
def test_a_run_that_is_interrupted_over_and_over_goes_on_bit_for_bit(
    clips: Path, model_folder: Path, tmp_path: Path
) -> None:
    whole, job = Job(tmp_path / "whole", clips, model_folder), Job(tmp_path, clips, model_folder)
    assert whole.start() == [0, 0]
    # moment, rank and signal; the steps of sampling until then
    for moment, rank, number, edits in (
        ("invert", 1, KILL, 0),
        ("invert", 1, TERM, 0),
        ("read", 0, USR1, 0),
        ("edit", 0, KILL, 3),  # two of them are kept
        ("edit", 1, USR1, 1),
        ("write", 0, KILL, 3),
        ("write", 0, TERM, 0),
        ("meet", 1, USR1, 0),
    ):
        case = f"{moment} on rank {rank}, {number!r}: {tmp_path / 'said'}"
        codes = job.start((moment, rank, number), slow="write 0" if moment == "meet" else "")
        if number == KILL:
            assert codes[rank] == -KILL, case
            assert codes[1 - rank] not in (None, 0, -KILL), case
        else:
            assert codes == [75, 75], case
            assert not [path for path in job.runs.rglob("*") if path.is_file()], case
        assert not job.done, case
        assert job.steps["edit"] == edits, case
    assert job.start() == [0, 0]
    assert (job.steps["edit"], job.steps["invert"]) == (6, 0)  # of the second clip
    assert job.done == ["one", "two"]
    for found, wanted in zip(job.frames(), whole.frames(), strict=True):
        assert torch.equal(found, wanted)


def test_ranks_that_wait_for_another_that_reads_have_a_signal(
    clips: Path, model_folder: Path, tmp_path: Path
) -> None:
    job = Job(tmp_path, clips, model_folder)
    kills = ("begin", 1, USR1), ("begin", 2, TERM)
    assert job.start(*kills, slow="read 0", ranks=3) == [75, 75, 75]
    assert not job.runs.exists()


@pytest.mark.full
def test_groups_of_ranks_stop_while_some_wait_at_the_end(
    clips: Path, model_folder: Path, tmp_path: Path
) -> None:
    job = Job(tmp_path, clips, model_folder, "--model.ranks_per_clip=1")
    assert job.start(("edit", 0, USR1)) == [75, 75]
    assert job.start(("end", 1, TERM), slow="write 0") == [75, 75]
    assert job.done == ["two"]
    assert job.start(("write", 0, KILL)) == [-KILL, 75]
    assert job.done == ["two"]
    assert job.start() == [0, 0]
    assert job.done == ["one", "two"]


@pytest.mark.full
def test_groups_of_ranks_stop_when_the_first_is_gone(
    clips: Path, model_folder: Path, tmp_path: Path
) -> None:
    job = Job(tmp_path, clips, model_folder, "--model.ranks_per_clip=1")
    assert job.start(("end", 0, TERM), slow="write 1") == [75, 75]
    assert job.done == ["one"]
    assert job.start(("end", 0, KILL), slow="write 1") == [-KILL, 75]
    assert job.done == ["one"]


@pytest.mark.full
def test_slurm_ends_no_rank_that_stops(clips: Path, model_folder: Path, tmp_path: Path) -> None:
    job = Job(tmp_path, clips, model_folder)
    assert job.start(("edit", 1, USR1), slurm=True) == [75, 0]  # any other ends all, at once
    assert job.start(slurm=True) == [0, 0]
    assert job.done == ["one", "two"]


def test_a_launcher_ends_those_that_do_not_notice_a_lost_rank(
    clips: Path, model_folder: Path, tmp_path: Path
) -> None:
    job = Job(tmp_path, clips, model_folder, "--model.ranks_per_clip=1")
    words = [*job.words, "--trainer.callbacks+=tests.killing.Hasty"]
    for name, value in (("KillAt", {"moment": "edit", "rank": 1}), ("Slow", {"rank": 0})):
        words += [f"--trainer.callbacks+=tests.killing.{name}"]
        words += [f"--trainer.callbacks.{option}={given}" for option, given in value.items()]
    first, second = launched(2, words)
    second.join(PATIENCE)
    assert first.is_alive()
    os.kill(first.pid or 0, TERM)  # as torchrun and srun do when one is lost
    assert ended([first, second]) == [75, -KILL]
    assert not job.done


def test_of_two_commands_into_one_folder_the_later_is_refused(
    clips: Path, model_folder: Path, tmp_path: Path
) -> None:
    def begun(steps: int) -> BaseProcess:
        words = [
            "predict", f"--data.video={clips.parent / 'one.mp4'}", *EDIT,
            f"--model.backbone={model_folder}", f"--model.steps={steps}", "--model.cache=null",
            f"--output.folder={tmp_path / 'runs'}", "--trainer.accelerator=cpu",
        ]  # fmt: skip
        return command(words, {}, tmp_path / f"{steps}")

    first = begun(30)
    while first.is_alive() and not (tmp_path / "runs" / "one" / ".lock").exists():
        first.join(0.05)
    assert ended([begun(2)]) == [2]
    assert "another run writes to" in (tmp_path / "2").read_text()
    assert first.is_alive()
    assert ended([first]) == [0]
    record = yaml.safe_load((tmp_path / "runs" / "one" / "run.yaml").read_text())
    assert record["model"]["steps"] == 30
