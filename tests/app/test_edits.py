"""Edits as the page runs them, without the page."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any, Literal

import gradio as gr
import pytest
import torch
import yaml
from PIL import Image

from tests.app.conftest import given
from tests.video.making import make_video, noise
from tokenflow.app.edits import Device, Edit
from tokenflow.app.page import Page, Result, progress
from tokenflow.app.request import Requests, command_of, yaml_of
from tokenflow.app.results import Runs
from tokenflow.cli.main import main
from tokenflow.cli.predict import run
from tokenflow.editors import SDEdit, Step
from tokenflow.engine.lightning.callback import EditCallback
from tokenflow.errors import InputError
from tokenflow.metrics import psnr
from tokenflow.report import read_run
from tokenflow.runs.files import EDITED, METRICS
from tokenflow.video import read_clip


class Stopped(Edit):
    """Asks to stop after two steps of sampling."""

    def on_prediction(self, trainer: Any, module: Any, done: int, clean: torch.Tensor) -> None:
        if done == 2:
            self.stop.set()


class Steps(EditCallback):
    """Keeps the steps of sampling."""

    def __init__(self) -> None:
        self.done: list[int] = []

    def on_edit_step(
        self, trainer: Any, module: Any, stage: str, step: int, steps: int
    ) -> Literal["stop"] | None:
        if stage == "edit":
            self.done.append(step)
        return None


def test_predict_goes_on_from_an_edit_that_was_stopped(requests: Requests, tmp_path: Path) -> None:
    """So the configuration is the same to both, with every default."""
    options = {"editor": "PnP", "editor.PnP.features": "0.5", "steps": 4}
    configuration = requests.configuration(given(requests, **options))
    assert [*Device(requests).run(Stopped(configuration))][-1].stage == "stopped"
    file, steps = tmp_path / "edit.yaml", Steps()
    file.write_text(yaml_of(configuration))
    run(["--config", str(file)], [steps])
    assert steps.done == [3, 4]


def test_who_leaves_stops_an_edit_and_the_end_of_the_server_waits(requests: Requests) -> None:
    device = Device(requests)
    first, second = (Edit(requests.configuration(given(requests, steps=10))) for _ in range(2))
    news = device.run(first)
    while next(news).stage != "edit":
        pass
    news.close()  # as Gradio does when a page is gone
    with device.changed:
        device.waiting.append(second)
        device.changed.notify()
    device.close()
    assert first.over.wait(20)
    assert second.over.wait(20)
    ends = [list(one.news.queue)[-1] for one in (first, second)]
    assert [one.stage for one in ends] == ["stopped", "stopped"]
    assert not (requests.folder / "clip").exists()


def test_the_command_makes_the_same_edit(requests: Requests) -> None:
    options = {
        "propagation": "FlowWeighted",
        "propagation.FlowWeighted.flow": "DIS",
        "report_reconstruction": True,
        "batch": 1,
        "auto": True,
    }
    configuration = requests.configuration(given(requests, **options))
    assert [*Device(requests).run(Edit(configuration))][-1].stage == "done"
    command = command_of(configuration)
    assert "--model.propagation.flow DIS" in command
    assert "--model.mask auto" in command
    assert Runs(requests.folder).values("clip", requests)["auto"] is True
    program, *words = shlex.split(command)
    assert program == "tokenflow"
    main(words)
    again = requests.folder.with_name("runs-again") / "clip" / EDITED
    assert again.read_bytes() == (requests.folder / "clip" / EDITED).read_bytes()


def test_control_and_mask_are_in_the_record_and_come_back_as_they_were(
    requests: Requests, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(requests.uploads))
    page, layer = Page(requests), Image.new("RGBA", (32, 32))
    layer.paste("white", (0, 0, 16, 32))
    mask = page.drawn({"layers": [layer]})
    control = requests.uploads / "control.mkv"  # which browsers do not play
    control.write_bytes((requests.uploads / "clip.mp4").read_bytes())
    options = {
        "editor": "ControlNet", "editor.ControlNet.condition": "ControlVideo", "mask": mask,
        "control": str(control), "measure": True,
    }  # fmt: skip
    configuration = requests.configuration(given(requests, **options))
    last = [*Device(requests).run(Edit(configuration))][-1]
    assert last.stage == "done", last.reason
    record = read_run(requests.folder / "clip").record
    names = {"data.video", "model.mask", "model.editor.condition.path"}
    assert set(record["run"]["inputs"]) == names
    page.build()
    filled = page.again(None, "clip")
    sent = {name: filled[field]["value"] for name, field in page.fields.items() if field in filled}
    assert (sent["control"]["path"], sent["mask"]) == (str(control), None)
    (again,) = sent["drawn"]["layers"]
    assert page.drawn({"layers": [Image.open(again["path"])]}) == mask
    assert (sent["editor"], sent["steps"], sent["guidance"]) == ("ControlNet", 2, 3.0)
    assert (requests.folder / "clip" / METRICS).exists()
    paths = requests.uploads / "clip.mp4", requests.folder / "clip" / EDITED
    source, edited = (read_clip(path).frames for path in paths)
    inside, outside = (psnr(source[..., w], edited[..., w]) for w in (slice(12), slice(20, None)))
    assert outside > inside + 10, "outside of the mask the source stays"


def test_an_edit_that_cannot_be_made_says_why(requests: Requests) -> None:
    configuration = requests.configuration(given(requests, **{"editor.SDEdit.strength": 2.0}))
    with pytest.raises(InputError, match="strength is the share"):
        requests.complete(configuration)
    last = [*Device(requests).run(Edit(configuration))][-1]
    assert (last.stage, "strength is the share" in last.reason) == ("failed", True)


def test_an_edit_that_fails_midway_says_why_and_the_next_one_runs(
    requests: Requests, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, advance = Device(requests), SDEdit.advance

    def once(self: SDEdit, x: Any, outputs: Any, step: Step, source: Any) -> Any:
        if step.index == 1:
            monkeypatch.setattr(SDEdit, "advance", advance)
            raise RuntimeError("<midway>")
        return advance(self, x, outputs, step, source)

    monkeypatch.setattr(SDEdit, "advance", once)
    first, second = (Edit(requests.configuration(given(requests))) for _ in range(2))
    running = device.run(first)
    next(running)
    waiting = device.run(second)
    next(waiting)
    *_, failed = running
    assert failed.stage == "failed"
    assert "SDEdit of tokenflow" in failed.reason
    assert "failed in advance: RuntimeError: &lt;midway&gt;" in progress(failed)
    assert [*waiting][-1].stage == "done"
    assert [one.name for one in requests.folder.glob("[!.]*")] == ["clip"]


def test_a_long_upload_is_not_decoded_to_be_looked_at(requests: Requests) -> None:
    def spoilt(index: int, data: bytes) -> bytes:
        return data[:8] + bytes(len(data) - 8) if index == 8 else data

    path = make_video(requests.uploads / "long.mkv", noise(12, 32, 32), damage=spoilt)
    shown, first, count, most = Page(requests).look(str(path), 1, 3)
    assert shown.count("<img") == 3
    assert [first["maximum"], count["maximum"]] == most == [11, 8]


def test_a_mask_that_was_drawn(requests: Requests) -> None:
    page = Page(requests)
    shown = page.canvas(str(requests.uploads / "clip.mp4"), None)
    assert shown["value"]["background"].size == (32, 32)
    empty, layer = Image.new("RGBA", (8, 6)), Image.new("RGBA", (8, 6))
    layer.paste((255, 255, 255, 255), (2, 0, 4, 6))
    assert page.drawn(None) is None
    assert page.drawn({"layers": [empty]}) is None
    path = page.drawn({"layers": [empty, layer]})
    assert path is not None
    assert requests.uploaded({"mask": path}, "mask") == Path(path)
    drawn = Image.open(path)
    assert (drawn.size, drawn.mode, drawn.getbbox()) == ((8, 6), "L", (2, 0, 4, 6))
    assert drawn.getextrema() == (0, 255)
    both = {"drawn": {"layers": [layer]}, "mask": "clip.mp4"}
    with gr.Blocks():
        state, result = gr.HTML(), Result(page, "result")
    (said,) = page.edit(both, [], state, result)
    assert "expected one mask, got a drawn one and a video" in said[state]


def test_the_yaml_has_what_differs_from_the_defaults(requests: Requests) -> None:
    configuration = requests.configuration(given(requests, seed=3, guidance=""))
    model = yaml.safe_load(yaml_of(configuration))["model"]
    assert model["seed"] == 3
    assert not {"guidance", "blend", "negative_prompt"} & set(model)
