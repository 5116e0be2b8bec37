"""Processes that are killed, hang or are asked to stop, and the same command once more."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections import Counter
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
import yaml

from tests.on_ranks import PATIENCE, command, ended, launched
from tokenflow.testing import tiny_clip
from tokenflow.video import Clip, read_clip, write_clip

STEP = 1.0
"""More seconds than a step of these clips takes."""
FILES = [
    "compare.mp4", "contact_sheet.png", "edited.mp4", "features.json", "report.html", "run.yaml",
]  # fmt: skip


def manifest(folder: Path) -> Path:
    rows = []
    for name in ("one", "two"):
        frames = tiny_clip(6).frames if name == "one" else tiny_clip(6).frames.flip(0)
        write_clip(folder / f"{name}.mp4", Clip.from_frames(frames))
        rows.append({"video": f"{name}.mp4"})
    path = folder / "clips.yaml"
    path.write_text(yaml.safe_dump(rows))
    return path


def start(
    folder: Path, clips: Path, model: Path, *words: str, ranks: int = 2, output: Path | None = None
) -> list[BaseProcess]:
    options = [
        "predict", f"--data.manifest={clips}", f"--model.backbone={model}",
        "--model.prompt=a ball", "--model.steps=6", "--model.save_every=2",
        "--model.keyframe_every=2", "--output.crf=0", f"--model.cache={folder / 'cache'}",
        f"--output.folder={folder / 'runs'}", "--allow_imports=tests",
    ]  # fmt: skip
    return launched(ranks, [*options, *words], output)


def frames(folder: Path) -> list[torch.Tensor]:
    for name in ("one", "two"):
        found = {p.name for p in (folder / "runs" / name).iterdir()}
        assert found | {"features.json"} == set(FILES)  # which a run that is only written lacks
    return [read_clip(folder / "runs" / name / "edited.mp4").frames for name in ("one", "two")]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return manifest(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="module")
def expected(
    tmp_path_factory: pytest.TempPathFactory, clips: Path, model_folder: Path
) -> list[torch.Tensor]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert ended(start(folder, clips, model_folder)) == [0, 0]
    return frames(folder)


def killing(moment: str, rank: int, sent: int) -> list[str]:
    return [
        "--trainer.callbacks+=tests.killing.KillAt", f"--trainer.callbacks.moment={moment}",
        f"--trainer.callbacks.rank={rank}", f"--trainer.callbacks.sent={int(sent)}",
    ]  # fmt: skip


def goes_on(folder: Path, clips: Path, model: Path, edits: int) -> None:
    """Starts once more: so many steps of sampling, of 12, and no inversion that is kept."""
    file = folder / "steps"
    noting = ["--trainer.callbacks+=tests.killing.Noting", f"--trainer.callbacks.file={file}"]
    assert ended(start(folder, clips, model, *noting)) == [0, 0]
    steps = Counter(file.read_text().split())
    assert steps["edit"] == edits
    assert steps["invert"] == (6 if edits == 12 else 0)  # both clips have the same frames


MOMENTS = [
    ("read", 1, 12), ("invert", 1, 12), ("edit", 0, 10), ("write", 0, 6), ("compare", 0, 6),
    ("between", 1, 6),
]  # fmt: skip


@pytest.mark.parametrize(("moment", "rank", "edits"), MOMENTS)
def test_a_killed_rank_ends_all_and_the_next_start_goes_on(
    moment: str, rank: int, edits: int, clips: Path, model_folder: Path, tmp_path: Path,
    expected: list[torch.Tensor],
) -> None:  # fmt: skip
    codes = ended(start(tmp_path, clips, model_folder, *killing(moment, rank, signal.SIGKILL)))
    assert codes[rank] == -signal.SIGKILL
    assert codes[1 - rank] not in (None, 0, -signal.SIGKILL)
    finished = sorted(p.parent.name for p in tmp_path.glob("runs/*/run.yaml"))
    videos = sorted(p.parent.name for p in tmp_path.glob("runs/*/edited.mp4"))
    assert finished == (["one"] if moment == "between" else [])
    assert videos == finished
    kinds = [p.name for p in tmp_path.glob("cache/*/*.safetensors")]
    assert bool(kinds) is (moment != "read" and moment != "invert")
    goes_on(tmp_path, clips, model_folder, edits)
    for found, wanted in zip(frames(tmp_path), expected, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("moment", "rank", "edits"),
    [("read", 1, 12), ("invert", 0, 12), ("edit", 1, 9), ("write", 0, 6), ("wait", 1, 6)],
)
def test_a_signal_to_one_rank_stops_all_and_the_next_start_goes_on(
    moment: str, rank: int, edits: int, clips: Path, model_folder: Path, tmp_path: Path,
    expected: list[torch.Tensor],
) -> None:  # fmt: skip
    note = tmp_path / "sent"
    words = [*killing(moment, rank, signal.SIGTERM), f"--trainer.callbacks.note={note}"]
    if moment == "wait":
        words += ["--trainer.callbacks+=tests.killing.Slow"]
    assert ended(start(tmp_path, clips, model_folder, *words)) == [75, 75]
    assert time.time() - float(note.read_text()) < 5 + STEP
    assert not (tmp_path / "runs").exists()
    goes_on(tmp_path, clips, model_folder, edits)
    for found, wanted in zip(frames(tmp_path), expected, strict=True):
        assert torch.equal(found, wanted)


def test_a_signal_to_two_of_three_ranks_stops_all(
    clips: Path, model_folder: Path, tmp_path: Path
) -> None:
    note = f"--trainer.callbacks.note={tmp_path / 'sent'}"
    words = [word for rank in (0, 2) for word in (*killing("edit", rank, signal.SIGTERM), note)]
    assert ended(start(tmp_path, clips, model_folder, *words, ranks=3)) == [75, 75, 75]
    assert time.time() - float((tmp_path / "sent").read_text()) < 5 + STEP
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_whose_other_hangs_ends_and_the_next_start_goes_on(
    rank: int, clips: Path, model_folder: Path, tmp_path: Path, expected: list[torch.Tensor]
) -> None:
    words = [*killing("edit", rank, signal.SIGSTOP), "--trainer.callbacks+=tests.killing.Impatient"]
    said = tmp_path / "said"
    processes = start(tmp_path, clips, model_folder, *words, output=said)
    processes[1 - rank].join(PATIENCE)
    assert processes[rank].is_alive()
    codes = [process.exitcode for process in processes]
    processes[rank].kill()
    processes[rank].join()
    assert codes[1 - rank] == 1
    assert f"rank {1 - rank} ends, as a process is lost that it waits for" in said.read_text()
    goes_on(tmp_path, clips, model_folder, 10)
    for found, wanted in zip(frames(tmp_path), expected, strict=True):
        assert torch.equal(found, wanted)


def test_a_process_that_hangs_leaves_none_behind_in_its_group_or_in_others(
    clips: Path, model_folder: Path, tmp_path: Path
) -> None:
    words = [
        *killing("edit", 2, signal.SIGSTOP), "--trainer.callbacks+=tests.killing.Impatient",
        "--trainer.callbacks+=tests.killing.Slow", "--model.ranks_per_clip=2",
    ]  # fmt: skip
    processes = start(tmp_path, clips, model_folder, *words, ranks=4)
    for rank in (0, 1, 3):
        processes[rank].join(PATIENCE)
    codes = [process.exitcode for process in processes]
    processes[2].kill()
    processes[2].join()
    assert codes == [75, 75, None, 1]


@pytest.mark.parametrize(("moment", "rank"), [("end", 0), ("end", 1), ("edit", 0), ("edit", 1)])
def test_a_signal_to_one_group_stops_those_that_edit_and_those_that_wait(
    moment: str, rank: int, clips: Path, model_folder: Path, tmp_path: Path
) -> None:
    note = tmp_path / "sent"
    words = [
        *killing(moment, rank, signal.SIGTERM), f"--trainer.callbacks.note={note}",
        "--trainer.callbacks+=tests.killing.Slow", f"--trainer.callbacks.rank={1 - rank}",
        "--model.ranks_per_clip=1",
    ]  # fmt: skip
    assert ended(start(tmp_path, clips, model_folder, *words)) == [75, 75]
    assert time.time() - float(note.read_text()) < 5 + STEP
    done = [p.parent.name for p in tmp_path.glob("runs/*/run.yaml")]
    assert done == ([("one", "two")[rank]] if moment == "end" else [])


@pytest.mark.parametrize("rank", [0, 1])
def test_a_group_that_edits_stops_where_it_can_go_on_when_another_is_lost(
    rank: int, clips: Path, model_folder: Path, tmp_path: Path
) -> None:
    words = [
        *killing("edit", rank, signal.SIGKILL), "--trainer.callbacks+=tests.killing.Slow",
        f"--trainer.callbacks.rank={1 - rank}", "--model.ranks_per_clip=1",
        "--trainer.callbacks+=tests.killing.Impatient",
    ]  # fmt: skip
    codes = ended(start(tmp_path, clips, model_folder, *words))
    assert codes[rank] == -signal.SIGKILL
    assert codes[1 - rank] == 75
    assert not list(tmp_path.glob("runs/*/run.yaml"))


def test_a_rank_that_has_done_its_clips_notices_when_another_is_lost(
    clips: Path, model_folder: Path, tmp_path: Path
) -> None:
    words = [*killing("edit", 1, signal.SIGKILL), "--model.ranks_per_clip=1"]
    assert ended(start(tmp_path, clips, model_folder, *words)) == [2, -signal.SIGKILL]
    assert [p.parent.name for p in tmp_path.glob("runs/*/run.yaml")] == ["one"]


def test_of_two_commands_into_one_folder_the_later_is_refused(
    clips: Path, model_folder: Path, tmp_path: Path
) -> None:
    def begun(steps: int) -> BaseProcess:
        words = [
            "predict", f"--data.video={clips.parent / 'one.mp4'}", "--model.prompt=a ball",
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


def test_a_process_whose_launcher_has_ended_before_it_begins_does_not_begin() -> None:
    nobody = 1 << 30
    code = (
        f"from tokenflow.engine.ranks.preemption import end_with_parent\nend_with_parent({nobody})"
    )
    ended = subprocess.run([sys.executable, "-c", f"{code}\nprint('on')"], capture_output=True)
    assert (ended.returncode, ended.stdout) == (75, b"")
