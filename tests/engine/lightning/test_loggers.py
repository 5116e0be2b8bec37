"""What loggers are given: TensorBoard for real, the others by their public interfaces."""

from __future__ import annotations

import csv
import io
from inspect import Signature, signature
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, WandbLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tokenflow.cli.main import main
from tokenflow.engine.lightning.loggers import log_run
from tokenflow.video import Clip, write_clip


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """Of a run of 5 frames, by TensorBoard and into a CSV file; with the run."""
    folder = tmp_path_factory.mktemp("logs")
    frames = torch.rand(5, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    video = write_clip(folder / "in.mp4", Clip.from_frames(frames))
    main([
        "predict", f"--data.video={video}", f"--model.backbone={model_folder}",
        "--model.prompt=a ball", "--model.steps=1", "--model.cache=null",
        f"--output.folder={folder / 'runs'}", "--trainer.accelerator=cpu",
        "--metrics.measure=true", "--metrics.distances=[1]",
        f"--trainer.logger+={{class_path: TensorBoardLogger, init_args: {{save_dir: {folder}}}}}",
        f"--trainer.logger+={{class_path: CSVLogger, init_args: {{save_dir: {folder / 'csv'}}}}}",
    ])  # fmt: skip
    return folder


def test_tensorboard_shows_numbers_frames_and_video(logs: Path) -> None:
    [events] = logs.glob("lightning_logs/version_0")
    found = EventAccumulator(str(events)).Reload()
    tags = found.Tags()
    assert {"in/seconds/edit", "in/psnr", "in/warp_error_1"} <= set(tags["scalars"])
    assert found.Scalars("in/seconds/edit")[0].value > 0
    assert set(tags["images"]) == {"in/frames", "in/edited"}
    pictures = {
        tag: Image.open(io.BytesIO(found.Images(tag)[0].encoded_image_string))
        for tag in tags["images"]
    }
    assert pictures["in/frames"].size == Image.open(logs / "runs/in/contact_sheet.png").size
    assert pictures["in/edited"].size == (48, 32)
    assert pictures["in/edited"].n_frames == 5


def test_any_logger_has_the_numbers(logs: Path) -> None:
    [file] = logs.glob("csv/lightning_logs/version_0/metrics.csv")
    with file.open() as opened:
        [row] = csv.DictReader(opened)
    assert float(row["in/seconds/edit"]) > 0
    assert float(row["in/psnr"]) > 0


def test_a_logger_that_fails_stops_neither_another_one_nor_the_job(
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def lost(*_: Any) -> None:
        raise ConnectionError("the server is gone")

    for call in ("log_metrics", "finalize"):
        monkeypatch.setattr(CSVLogger, call, lost)
    frames = torch.rand(3, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    for name in ("one", "two"):
        write_clip(tmp_path / f"{name}.mp4", Clip.from_frames(frames))
    rows = [{"video": f"{name}.mp4"} for name in ("one", "two")]
    (tmp_path / "clips.yaml").write_text(yaml.safe_dump(rows))
    main([
        "predict", f"--data.manifest={tmp_path / 'clips.yaml'}", "--model.prompt=a ball",
        f"--model.backbone={model_folder}", "--model.steps=1", "--model.cache=null",
        f"--output.folder={tmp_path / 'runs'}", "--trainer.accelerator=cpu",
        f"--trainer.logger+={{class_path: CSVLogger, init_args: {{save_dir: {tmp_path / 'csv'}}}}}",
        f"--trainer.logger+={{class_path: TensorBoardLogger, init_args: {{save_dir: {tmp_path}}}}}",
    ])  # fmt: skip
    out, err = capsys.readouterr()
    assert "2 clips: 2 done" in out
    [events] = tmp_path.glob("lightning_logs/version_0/events*")
    tags = EventAccumulator(str(events)).Reload().Tags()
    why = "on nothing is logged by CSVLogger: ConnectionError: the server is gone"
    assert err.count(f"from {tmp_path / 'runs' / 'one'} {why}") == err.count("CSVLogger: ") == 1
    for name in ("one", "two"):
        assert f"{name}/seconds/edit" in tags["scalars"]


class Recorder:
    """Notes every call of its methods."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **_: self.calls.append((name, *args))


def test_weights_and_biases_has_sheet_and_video(
    logs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, run = Recorder(), logs / "runs" / "in"
    for name in ("log_metrics", "log_image", "log_video", "save"):
        known = signature(getattr(WandbLogger, name))

        def note(*args: Any, name: str = name, known: Signature = known) -> None:
            known.bind(*args)
            getattr(seen, name)(*args[1:])

        monkeypatch.setattr(WandbLogger, name, note)
    log_run(WandbLogger.__new__(WandbLogger), "in", run)
    (name, values), *rest = seen.calls
    assert name == "log_metrics"
    assert values["in/psnr"] > 0
    assert rest == [
        ("log_image", "in/frames", [str(run / "contact_sheet.png")]),
        ("log_video", "in/edited", [str(run / "edited.mp4")]),
        ("save",),
    ]


def test_mlflow_has_sheet_and_video(logs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, run = Recorder(), logs / "runs" / "in"
    monkeypatch.setattr(MLFlowLogger, "experiment", seen)
    monkeypatch.setattr(MLFlowLogger, "run_id", "7")
    monkeypatch.setattr(MLFlowLogger, "log_metrics", lambda _, values: None)
    log_run(MLFlowLogger.__new__(MLFlowLogger), "in", run)
    assert seen.calls == [
        ("log_artifact", "7", str(run / name), "in") for name in ("contact_sheet.png", "edited.mp4")
    ]
