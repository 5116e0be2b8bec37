"""A run's inputs: opened before the first pass, and found again from any folder."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tokenflow.cli.inputs import make_absolute
from tokenflow.cli.main import main
from tokenflow.cli.predict import run, warn_of_unknown_words
from tokenflow.engine.lightning.callback import EditCallback
from tokenflow.engine.lightning.job import ClipSource, Job
from tokenflow.engine.lightning.mask import cut_mask
from tokenflow.engine.lightning.run_writer import shown
from tokenflow.engine.region import white
from tokenflow.errors import InputError
from tokenflow.storage.digests import of_path
from tokenflow.video import Clip, write_clip, write_image


def test_paths_become_absolute_and_the_typed_ones_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sd").mkdir()
    (tmp_path / "in.mp4").touch()  # has the prompt's name
    video = {"class_path": "tokenflow.ControlVideo", "init_args": {"path": "edges"}}
    further = [{"model": "sd", "condition": video}, {"model": "owner/name"}]
    options = {"model": "miniature", "condition": video, "further": further}
    configuration: dict[str, Any] = {
        "data": {"video": "in.mp4", "manifest": None},
        "model": {
            "prompt": "in.mp4",
            "backbone": "sd",
            "cache": "~/cache",
            "editor": {"class_path": "tokenflow.ControlNet", "init_args": options},
        },
        "output": {"folder": "runs"},
        "metrics": {"flow": {"class_path": "FlowFiles", "init_args": {"folder": "../flow"}}},
    }
    typed = make_absolute(configuration)
    assert configuration["data"] == {"video": str(tmp_path / "in.mp4"), "manifest": None}
    model = configuration["model"]
    assert (model["prompt"], model["cache"]) == ("in.mp4", "~/cache")
    assert model["backbone"] == further[0]["model"] == str(tmp_path / "sd")
    assert (options["model"], further[1]["model"]) == ("miniature", "owner/name")
    assert video["init_args"] == {"path": str(tmp_path / "edges")}
    assert typed == {
        "data.video": "in.mp4",
        "model.backbone": "sd",
        "output.folder": "runs",
        "model.editor.condition.path": "edges",
        "model.editor.further.0.model": "sd",
        "metrics.flow.folder": "../flow",
    }
    assert make_absolute(configuration) == {}


def test_a_digest_is_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert of_path(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()
    for name in "xy":
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(b"1")
    assert of_path(tmp_path / "x") == of_path(tmp_path / "y")
    (tmp_path / "y" / "1.png").rename(tmp_path / "y" / "2.png")
    assert of_path(tmp_path / "x") != of_path(tmp_path / "y")


@pytest.fixture
def video(tmp_path: Path) -> Path:
    ramp = torch.linspace(0, 1, 32)
    frames = torch.stack([(ramp + i / 12).clamp(0, 1).expand(3, 16, 32) for i in range(4)])
    return write_clip(tmp_path / "here" / "ramp.mp4", Clip.from_frames(frames))


def words(model_folder: Path, *more: str) -> list[str]:
    return [
        "predict", "--data.video=ramp.mp4", f"--model.backbone={model_folder}",
        "--model.prompt=a blue ball", "--model.steps=1", "--output.folder=runs",
        "--trainer.accelerator=cpu", *more,
    ]  # fmt: skip


def test_a_run_folder_works_from_any_folder(
    video: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(video.parent)
    main(words(model_folder))
    out, _ = capsys.readouterr()
    assert out == "runs/ramp: see runs/ramp/report.html\n"
    run = video.parent / "runs" / "ramp"
    record = yaml.safe_load((run / "run.yaml").read_text())
    assert record["data"]["video"] == record["run"]["source"]["video"] == str(video)
    assert record["run"]["typed"] == {"data.video": "ramp.mp4", "output.folder": "runs"}
    digest = hashlib.sha256(video.read_bytes()).hexdigest()
    assert record["run"]["inputs"] == {"data.video": {"path": str(video), "sha256": digest}}

    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    main(["evaluate", "../here/runs/ramp", "--distances=1"])
    assert "psnr" in json.loads((run / "metrics.json").read_text())["metrics"]
    main(["report", str(run)])
    main(["predict", f"--config={run / 'run.yaml'}", "--output.folder=again"])
    again = yaml.safe_load(Path("again/ramp/run.yaml").read_text())
    assert again["run"]["source"] == record["run"]["source"]

    write_clip(video, Clip.from_frames(torch.rand(4, 3, 16, 32)))
    with pytest.raises(SystemExit):
        main(["evaluate", str(run), "--distances=1"])
    assert "has changed since the run; edit again" in capsys.readouterr().err


class ChangesSource(EditCallback):
    """Deletes the source at the first step of an edit, or puts another file in its place."""

    def __init__(self, source: Path, delete: bool) -> None:
        self.source, self.delete = source, delete

    def on_edit_step(self, *_: Any) -> None:
        if self.delete:
            self.source.unlink(missing_ok=True)
        else:
            self.source.write_bytes(b"another video")


@pytest.mark.parametrize("delete", [True, False])
def test_digests_are_of_the_inputs_as_they_were_read(
    delete: bool, video: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(video.parent)
    digest = of_path(video)
    run(words(model_folder)[1:], [ChangesSource(video, delete)])
    record = yaml.safe_load(Path("runs/ramp/run.yaml").read_text())["run"]
    assert record["inputs"]["data.video"]["sha256"] == digest


def test_an_input_that_vanishes_is_named(tmp_path: Path) -> None:
    job = Job(ClipSource(tmp_path / "gone.mp4"))
    with pytest.raises(InputError, match=r"an input of gone cannot be read: .*gone\.mp4"):
        job.record()


def test_every_input_is_opened_before_the_model_is_loaded(
    video: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(video.parent)
    Path("text.mp4").write_text("no video")
    control = "{class_path: ControlVideo, init_args: {path: %s}}"
    flow = "{class_path: FlowFiles, init_args: {folder: gone}}"
    for more, message in (
        (["--data.video=text.mp4"], "text.mp4 is not a video that can be read"),
        (
            ["--metrics.mask=gone.mp4"],
            "gone.mp4 does not exist; expected a video",
        ),
        (["--metrics.mask=text.mp4"], "text.mp4 is not a video that can be read"),
        (
            ["--model.editor=ControlNet", f"--model.editor.condition={control % 'gone'}"],
            "gone does not exist; expected a video file or a folder of images for --model.editor",
        ),
        (
            ["--model.editor=ControlNet", f"--model.editor.condition={control % 'text.mp4'}"],
            "text.mp4 is not a video that can be read",
        ),
        (
            ["--model.propagation=FlowWeighted", f"--model.propagation.flow={flow}"],
            "gone does not exist; expected a file or folder for --model.propagation.flow.folder",
        ),
    ):
        with pytest.raises(SystemExit) as exit:
            # a model that is not there would be noticed first if it were loaded first
            main(words(Path("./nowhere"), *more))
        assert exit.value.code == 2
        assert message in capsys.readouterr().err
    assert not Path("runs").exists()


@pytest.mark.parametrize("length", ["the source's", "the edit's"])
@pytest.mark.parametrize("scale", [1, 2])
def test_a_mask_is_cut_and_scaled_as_its_clip(length: str, scale: int, tmp_path: Path) -> None:
    """A mask of 10 frames whose left n columns are white in frame n, for frames 2, 4 and 6."""
    for number in range(10) if length == "the source's" else (2, 4, 6):
        image = torch.zeros(3, 16 * scale, 32 * scale)
        image[..., : 2 * number * scale] = 1
        write_image(tmp_path / "mask" / f"{number}.png", image)
    choice = {"start": 2, "stop": 8, "stride": 2, "resolution": 16, "fit": "resize"}
    source = ClipSource(tmp_path / "in.mp4", **choice)
    edit = Clip.from_frames(torch.rand(3, 3, 16, 32))
    mask = white(shown(cut_mask(tmp_path / "mask", source, 16, edit)))
    assert [int(frame[0].sum()) for frame in mask] == [4, 8, 12]
    assert mask.shape == (3, 16, 32)


def test_a_mask_of_another_length(tmp_path: Path) -> None:
    for number in range(2):
        write_image(tmp_path / "mask" / f"{number}.png", torch.zeros(3, 16, 32))
    source = ClipSource(tmp_path / "in.mp4", start=2, stop=5)
    with pytest.raises(InputError, match="mask has 2 frames"):
        cut_mask(tmp_path / "mask", source, 16, Clip.from_frames(torch.rand(3, 3, 16, 32)))


@pytest.mark.parametrize(
    ("count", "size"), [(3, (16, 32)), (5, (16, 32)), (4, (32, 32))], ids=["short", "long", "high"]
)
def test_a_mask_that_does_not_fit_is_refused_before_the_edit(
    count: int, size: tuple[int, int], video: Path, model_folder: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(video.parent)
    for number in range(count):
        write_image(Path("mask") / f"{number}.png", torch.ones(3, *size))
    with pytest.raises(SystemExit) as exit:
        main(words(model_folder, "--metrics.mask=mask"))
    assert exit.value.code == 2
    err = capsys.readouterr().err
    assert "expected a mask of 4 frames of 32x16 like the edit" in err
    found = f"at least {count}" if count > 4 else f"{count}"
    assert f"mask, of {found} frames of {size[1]}x{size[0]}" in err
    assert "encode:" not in err
    assert not Path("runs/ramp").exists()


def test_unknown_words_are_named_once() -> None:
    with pytest.warns(UserWarning, match="does not know") as warned:
        warn_of_unknown_words(["a shiny red ball on grass", "a Shiny wombat", ""])
    [one] = warned
    said = str(one.message)
    assert "does not know shiny, wombat: " in said
    assert "docs/miniature.md" in said
    assert "striped" in said
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_unknown_words(["a striped red ball on grass"])
