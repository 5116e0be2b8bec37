"""Measuring during predict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from tokenflow.cli.main import main
from tokenflow.editors import SDEdit
from tokenflow.engine.lightning import metrics as metrics_module
from tokenflow.engine.lightning.metrics import Measuring, Sources
from tokenflow.engine.lightning.module import TokenFlowModule
from tokenflow.propagation import NNField
from tokenflow.report import Run
from tokenflow.video import Clip, write_clip, write_image


def test_nothing_of_a_clip_is_kept_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Sources] = []

    def leave(sources: Sources, *_: Any) -> None:
        seen.append(sources)

    monkeypatch.setattr(metrics_module, "leave", leave)
    metrics, module = Measuring(measure=True), TokenFlowModule(SDEdit(), NNField())
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    metrics.on_predict_start(trainer, module)
    for name in ("one", "two"):
        metrics.on_run_staged(trainer, module, Run(Path(name), {}))
    assert seen[0] is not seen[1]
    assert seen[0].measures is seen[1].measures  # networks are loaded once


@pytest.fixture
def words(tmp_path: Path, model_folder: Path) -> list[str]:
    """A measured run of 5 frames, beside which is its mask."""
    frames = torch.rand(5, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    video = write_clip(tmp_path / "in.mp4", Clip.from_frames(frames))
    hidden = torch.zeros(3, 32, 48)
    hidden[:, 5:20, 10:30] = 1
    for number in range(5):
        write_image(tmp_path / "mask" / f"{number}.png", hidden)
    return [
        "predict", f"--data.video={video}", f"--model.backbone={model_folder}",
        "--model.prompt=a ball", "--model.steps=1", f"--output.folder={tmp_path / 'runs'}",
        "--trainer.accelerator=cpu", "--metrics.measure=true", "--metrics.distances=1",
    ]  # fmt: skip


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as exit:
        main(words)
    assert exit.value.code == 2
    return capsys.readouterr().err


def test_a_mask_is_as_that_of_evaluate(
    words: list[str], tmp_path: Path, model_folder: Path
) -> None:
    mask, metrics = tmp_path / "mask", tmp_path / "runs" / "in" / "metrics.json"
    words = [*words, "--model.dtype=auto"]  # as evaluate takes it
    main([*words, f"--metrics.mask={mask}", "--metrics.round_trip=true"])
    left = json.loads(metrics.read_text())
    assert {"psnr_outside", "structure_outside"} <= left["metrics"].keys()
    metrics.unlink()
    main([
        "evaluate", str(metrics.parent), f"--mask={mask}", "--distances=1",
        f"--round_trip={model_folder}",
    ])  # fmt: skip
    assert json.loads(metrics.read_text()) == left


def test_a_mask_that_cannot_be_read_is_told_before_the_clip_is_edited(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    err = refused([*words, f"--metrics.mask={tmp_path / 'gone'}"], capsys)
    assert f"{tmp_path / 'gone'} does not exist; expected a video file or a folder of image" in err
    assert not (tmp_path / "runs").exists()


def test_one_mask_for_many_clips_is_refused_before_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "clips.csv").write_text("video\nin.mp4\n")
    err = refused([
        "predict", f"--data.manifest={tmp_path / 'clips.csv'}", "--model.prompt=a ball",
        "--model.backbone=./gone", "--trainer.accelerator=cpu", "--metrics.measure=true",
        "--metrics.mask=mask",
    ], capsys)  # fmt: skip
    assert "expected no --metrics.mask with --data.manifest" in err


def test_files_of_flow_are_refused_as_the_edits_motion(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flow = {"flow": "FlowFiles", "flow.folder": tmp_path, "motion": "edit"}
    video = tmp_path / "in.mp4"
    for command, prefix in (
        (words, "--metrics."), (["evaluate", f"--source={video}", f"--edited={video}"], "--")
    ):  # fmt: skip
        err = refused([*command, *(f"{prefix}{k}={v}" for k, v in flow.items())], capsys)
        assert "motion 'edit', got FlowFiles" in err
    assert not (tmp_path / "runs").exists()
