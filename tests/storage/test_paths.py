"""`~` is the user's home wherever a path may be given, as in YAML that no shell has seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from tokenflow.cli.main import main
from tokenflow.editors.conditions import ControlVideo
from tokenflow.engine.lightning.data import Video
from tokenflow.engine.lightning.job import ClipSource
from tokenflow.engine.lightning.mask import cut_mask
from tokenflow.propagation import RAFT, FlowFiles
from tokenflow.storage.paths import default_cache, local
from tokenflow.video import Clip, write_clip


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's home with one small video, and the folder that the test runs in beside it."""
    (home := tmp_path / "home").mkdir()
    (elsewhere := tmp_path / "elsewhere").mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(elsewhere)
    ramp = torch.linspace(0, 1, 32).expand(3, 3, 16, 32)
    write_clip(home / "in.mp4", Clip.from_frames(ramp))
    return home


def test_the_users_home(home: Path) -> None:
    assert local("~/a") == home / "a"
    assert local("~") == home
    for path in ("~nobody-of-this-name/a", "a/~", "./~/a", "/~"):
        assert local(path) == Path(path)


def test_the_cache_is_where_the_xdg_specification_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/fast/cache")
    assert default_cache() == "/fast/cache/tokenflow"
    for ignored in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert default_cache() == "~/.cache/tokenflow"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache() == "~/.cache/tokenflow"


def test_a_run_whose_paths_are_in_the_users_home(home: Path, model_folder: Path) -> None:
    model = {"prompt": "a ball", "steps": 2, "backbone": str(model_folder), "cache": "~/cache"}
    config = {
        "data": {"video": "~/in.mp4"},
        "model": model,
        "output": {"folder": "~/runs"},
        "metrics": {"measure": True, "mask": "~/in.mp4", "distances": 1},
        "trainer": {"accelerator": "cpu"},
    }
    Path("run.yaml").write_text(yaml.safe_dump(config))
    main(["predict", "--config=run.yaml"])
    made = {path.name for path in (home / "runs" / "in").iterdir()}
    assert {"edited.mp4", "metrics.json", "run.yaml"} <= made
    assert [path.name for path in Path.cwd().iterdir()] == ["run.yaml"]
    assert (home / "cache").is_dir()
    record = yaml.safe_load((home / "runs" / "in" / "run.yaml").read_text())
    assert record["run"]["source"]["video"] == str(home / "in.mp4")


def test_a_manifest_in_the_users_home(home: Path) -> None:
    (home / "clips.yaml").write_text("- {video: ~/in.mp4}\n- {video: in.mp4, name: again}\n")
    for root in (None, "~"):
        jobs = Video(manifest="~/clips.yaml", root=root).jobs
        assert [job.source.path for job in jobs] == [home / "in.mp4"] * 2


def test_flow_masks_control_and_weights_in_the_users_home(home: Path) -> None:
    clip = Clip.from_frames(torch.rand(3, 3, 16, 32))
    assert len(cut_mask("~/in.mp4", ClipSource(home / "in.mp4"), 16, clip)) == 3
    assert len(ControlVideo("~/in.mp4").of(clip)) == 3
    (home / "flow").mkdir()
    for pair in ("0_1", "1_0", "1_2", "2_1"):
        np.save(home / "flow" / f"{pair}.npy", np.zeros((16, 32, 2), np.float32))
    flow = FlowFiles("~/flow")
    flow.prepare(clip)
    assert len(flow.files) == 4
    assert RAFT("~/raft.pth").weights == home / "raft.pth"
