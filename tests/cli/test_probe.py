"""A run's features, by sampling it again up to a step."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml

from tests.cli.test_report import refused
from tokenflow.cli.main import main
from tokenflow.cli.probe import observe
from tokenflow.diffusion import Backbone
from tokenflow.engine.lightning import module
from tokenflow.report import read_run
from tokenflow.testing import tiny_clip
from tokenflow.video import write_clip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """Runs of the tiny model: of a manifest's two clips, the second is done."""
    where = tmp_path_factory.mktemp("runs")
    write_clip(where / "clip.mp4", tiny_clip(6))
    rows = [{"video": "clip.mp4", "name": "other"}, {"video": "clip.mp4", "name": "mine"}]
    (where / "clips.yaml").write_text(yaml.safe_dump(rows))
    main([
        "predict", f"--data.manifest={where / 'clips.yaml'}", "--data.part=2/2",
        f"--model.backbone={model_folder}", "--model.prompt=a bar", "--model.steps=3",
        "--model.keyframe_every=3", "--model.batch=2", f"--model.cache={where / 'cache'}",
        f"--output.folder={where / 'runs'}", "--trainer.accelerator=cpu",
    ])  # fmt: skip
    return where / "runs"


def change(folder: Path, section: str, **values: str) -> None:
    record = yaml.safe_load((folder / "run.yaml").read_text())
    record[section] |= values
    (folder / "run.yaml").write_text(yaml.safe_dump(record))


def test_what_a_site_sees_at_a_step(runs: Path, backbone: Backbone) -> None:
    files = {file.name: file.read_bytes() for file in (runs / "mine").iterdir()}
    site = next(iter(backbone.sites()))
    seen = observe(read_run(runs / "mine"), site, 1)
    assert (seen.site, seen.step, seen.steps) == (site, 1, 3)
    assert seen.frames == list(range(6))
    width = backbone.network.get_submodule(site).to_q.in_features
    assert seen.tokens.shape == (6, seen.parts[0][0].height, seen.parts[0][0].width, width)
    assert sorted(frame for window, _ in seen.parts for frame in window.frames) == list(range(6))
    kept = 0
    for window, found in seen.parts:
        tokens = window.height * window.width
        for number, frame in enumerate(window.frames):
            if frame in window.keyframes:  # NN-field finds its tokens at their own places
                own = torch.arange(tokens) + window.keyframes.index(frame) * tokens
                taken = found.weights[number].argmax(dim=-1, keepdim=True)
                assert torch.equal(found.indices[number].gather(1, taken)[:, 0], own)
                kept += 1
    assert kept == 2  # one keyframe in each window of three
    assert {file.name: file.read_bytes() for file in (runs / "mine").iterdir()} == files
    assert [folder.name for folder in runs.iterdir()] == ["mine"]


def test_a_runs_own_page_shows_features(runs: Path) -> None:
    text = (runs / "mine" / "report.html").read_text()
    assert "step 1 of 3" in text
    assert text.count("principal components") == 2
    main(["report", str(runs / "mine")])
    again = (runs / "mine" / "report.html").read_text()
    seen = slice(text.index("Where tokens come from"), text.index("</section>", text.index("Feat")))
    assert text[seen] in again  # from the file that the run has left


def test_the_page_shows_other_features_where_asked(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, page = str(runs / "mine"), tmp_path / "page.html"
    main(["report", mine, "--features", "--frame=4", "--step=2", f"--output={page}"])
    text = page.read_text()
    assert "step 2 of 3" in text
    assert "frame 4, from" in text
    monkeypatch.setattr(module, "edit_clip", None)  # what is refused takes no inversion
    refused([mine, "--features", "--frame=9"], "expected a frame from 0 to ", capsys)
    refused([mine, "--features", "--site=up"], "there is no site 'up'; expected", capsys)
    refused([mine, "--features", "--step=3"], "a step from 0 to 2, got 3", capsys)


def test_a_run_whose_features_cannot_be_had(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = Path(shutil.copytree(runs / "mine", tmp_path / "gone"))
    change(gone, "data", manifest="clips.yaml")
    refused([str(gone), "--features"], "is of an earlier version", capsys)
    assert not (gone / "failed.yaml").exists()
    joint = Path(shutil.copytree(runs / "mine", tmp_path / "mine"))
    change(joint, "model", consistency="joint")
    refused([str(joint), "--features"], "has no correspondences", capsys)
