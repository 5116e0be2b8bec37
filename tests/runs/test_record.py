"""What is read from a run's folder, and what is none."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest
import torch
from jsonargparse import _common as jsonargparse_state

from tests.report.making import bar, make_run
from tokenflow.cli.main import main
from tokenflow.errors import InputError
from tokenflow.report import read_run
from tokenflow.runs.record import Run, flat
from tokenflow.video import write_clip


def test_the_videos_are_those_of_the_run(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "bar"))
    source, edited = run.source(), run.edited()
    assert source.times == edited.times == bar().times
    # x264 at the writer's quality; the colours of source and edit are 0.4 apart on average
    assert (source.frames[:] - bar().frames).abs().mean() < 0.02
    assert (edited.frames[:] - bar(colour=(0.9, 0.1, 0.1)).frames).abs().mean() < 0.02
    assert torch.equal(source.frames[:][..., -1], run.source().frames[:][..., 63])


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected a finished run's folder, with a run\.yaml$"):
        read_run(tmp_path / "nowhere")
    make_run(tmp_path / "runs" / "one")
    with pytest.raises(InputError, match="it holds runs in one"):
        read_run(tmp_path / "runs")
    (tmp_path / "run.yaml").write_text("a: b: c")
    with pytest.raises(InputError, match=r"run\.yaml is no YAML"):
        read_run(tmp_path)
    (tmp_path / "run.yaml").write_text("- 1")
    with pytest.raises(InputError, match=r"expected a run's record, got \[1\]"):
        read_run(tmp_path)


def test_metrics_are_the_records_and_those_measured_later(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "bar", round_trip_psnr=30.25)
    assert read_run(folder).metrics == {"round_trip_psnr": 30.25}
    (folder / "metrics.json").write_text('{"metrics": {"warp_error": 0.25, "clip": null}}')
    assert read_run(folder).metrics == {"round_trip_psnr": 30.25, "warp_error": 0.25, "clip": None}


def test_the_round_trip_is_that_which_was_measured(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "bar")
    assert read_run(folder).round_trip == {}
    (folder / "metrics.json").write_text('{"metrics": {"ssim": 1}}')
    assert read_run(folder).round_trip == {}
    (folder / "metrics.json").write_text('{"metrics": {"ssim": 1}, "round_trip": {"ssim": 0.5}}')
    assert read_run(folder).round_trip == {"ssim": 0.5}
    assert read_run(folder).metrics == {"ssim": 1}
    (folder / "metrics.json").write_text('{"metrics": {"ssim": 1}, "round_trip": {"ssim": "x"}}')
    with pytest.raises(InputError, match=r"metrics\.json: expected round_trip, names with numbers"):
        _ = read_run(folder).round_trip


@pytest.mark.parametrize(
    "text", ["no json", "[1]", "{}", '{"metrics": {"a": {"b": 1}}}', '{"metrics": {"a": true}}']
)
def test_metrics_that_are_none(text: str, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "bar")
    (folder / "metrics.json").write_text(text)
    with pytest.raises(InputError, match=r"metrics\.json"):
        _ = read_run(folder).metrics


def test_settings_have_dotted_names() -> None:
    model = {"editor": {"class_path": "PnP", "init_args": {"features": 0.3}}, "steps": 5}
    assert flat("", model) == {"editor": "PnP", "editor.features": 0.3, "steps": 5}
    assert flat("data", {"video": "in.mp4", "stop": None}) == {"data.video": "in.mp4"}


def test_what_the_defaults_came_to_overrules_the_configuration(tmp_path: Path) -> None:
    configuration = {"model": {"editor": {"class_path": "PnP"}, "steps": 5, "seed": 0}}
    came = {"steps": 7, "editor": "tokenflow 1"}
    run = read_run(make_run(tmp_path / "bar", configuration=configuration, **came))
    assert run.settings["steps"] == 7
    assert run.settings["editor"] == "PnP"
    assert run.settings["editor.package"] == "tokenflow 1"
    assert "seconds" not in " ".join(run.settings)


def test_the_line_that_repeats_a_run_survives_any_folder(tmp_path: Path) -> None:
    words = shlex.split(read_run(make_run(tmp_path / "a b$" / "bar")).repeat)
    assert words == [
        "tokenflow", "predict", "--config", str(tmp_path / "a b$" / "bar" / "run.yaml"),
        "--output.folder", str(tmp_path / "a b$-again"),
    ]  # fmt: skip


OWN = """
from lightning.pytorch.callbacks import Callback

class Marking(Callback):
    pass
"""


def test_the_line_that_repeats_a_run_with_classes_of_another_package(
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = dict(jsonargparse_state.parsing_settings)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "otherpackage.py").write_text(OWN)
    write_clip(tmp_path / "in.mp4", bar(2))

    def predict(*words: str) -> None:
        """As a new process, which allows nothing yet."""
        monkeypatch.setattr(jsonargparse_state, "parsing_settings", dict(settings))
        main(["predict", *words])

    predict(
        "--data.video=in.mp4", "--model.prompt=a ball", f"--model.backbone={model_folder}",
        "--model.steps=1", "--model.cache=null", "--trainer.accelerator=cpu",
        "--trainer.callbacks+=otherpackage.Marking", "--allow_imports=otherpackage",
    )  # fmt: skip
    words = shlex.split(read_run("runs/in").repeat)
    assert words[-2:] == ["--allow_imports", "otherpackage"]
    with pytest.raises(SystemExit):
        predict(*words[2:-2])  # what the record says allows nothing
    assert "'otherpackage.Marking' is not allowed" in capsys.readouterr().err
    predict(*words[2:])
    again = read_run("runs-again/in")
    assert shlex.split(again.repeat)[-2:] == words[-2:]
    assert again.settings == read_run("runs/in").settings


@pytest.mark.parametrize(
    ("here", "folder", "again"),
    [
        ("runs", "bar", "../runs-again"),
        ("runs", "./bar", "../runs-again"),
        ("runs/bar", ".", "../../runs-again"),
        ("runs/other", "../bar", "../../runs-again"),
        (".", "runs/bar", "runs-again"),
    ],
)
def test_the_line_that_repeats_a_run_from_anywhere(
    here: str, folder: str, again: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path / "runs" / "bar")
    (tmp_path / "runs" / "other").mkdir()
    monkeypatch.chdir(tmp_path / here)
    assert shlex.split(read_run(folder).repeat)[-1] == again
    main(["report", folder])
    assert again in (tmp_path / "runs" / "bar" / "report.html").read_text()


def test_metrics_that_are_no_file(tmp_path: Path) -> None:
    run = Run(tmp_path, {})
    os.mkfifo(tmp_path / "metrics.json")
    with pytest.raises(InputError, match=r"metrics\.json is no file; remove it"):
        _ = run.metrics
