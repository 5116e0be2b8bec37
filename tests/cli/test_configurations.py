"""Configurations by path and by name, and that the command line overrules them."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from setuptools import build_meta

from tests.conftest import ROOT
from tokenflow.cli.configurations import INSTALLED, configs_first
from tokenflow.cli.main import main
from tokenflow.diffusion import Backbone, ModelError
from tokenflow.errors import InputError


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two configurations, which is the working folder."""
    (tmp_path / "one.yaml").write_text("model: {steps: 11, guidance: 1.5, seed: 1}")
    (tmp_path / "two.yaml").write_text("model: {steps: 22, guidance: 2.5}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def printed(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The model's options that a command comes to."""
    with pytest.raises(SystemExit):
        main(["predict", *words, "--print_config"])
    model: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)["model"]
    return model


@pytest.mark.parametrize(
    "words",
    [
        ["--config=one.yaml", "--config=two.yaml", "--model.steps=33"],
        ["--model.steps=33", "--config=one.yaml", "--config", "two.yaml"],
        ["--config", "one.yaml", "--model.steps", "33", "-c", "two.yaml"],
        ["--model.steps=33", "-c=one.yaml", "--config=two.yaml"],
        ["--model.steps=33", "--conf=one.yaml", "-ctwo.yaml"],
    ],
)
def test_the_command_line_overrules_files_and_the_later_file_the_earlier(
    two: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    model = printed(words, capsys)
    assert (model["steps"], model["guidance"], model["seed"]) == (33, 2.5, 1)


def test_a_file_overrules_the_environment(
    two: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TOKENFLOW_PREDICT__CONFIG", "one.yaml")
    monkeypatch.setenv("TOKENFLOW_PREDICT__MODEL__GUIDANCE", "4.5")
    model = printed(["--model.seed=7", "--config=two.yaml"], capsys)
    assert (model["steps"], model["guidance"], model["seed"]) == (22, 2.5, 7)
    model = printed(["--model.seed=7"], capsys)
    assert (model["steps"], model["guidance"], model["seed"]) == (11, 4.5, 7)


def test_an_installed_configuration_by_name(two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = yaml.safe_load((ROOT / "configs" / "sdedit.yaml").read_text())["model"]
    for name in ("sdedit", "sdedit.yaml"):
        assert printed([f"--config={name}"], capsys)["guidance"] == written["guidance"]
    (two / "sdedit").write_text("model: {guidance: 3.25}")  # a file goes first
    assert printed(["--config=sdedit"], capsys)["guidance"] == 3.25


def test_the_fast_mode_goes_with_editors_that_invert(
    two: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = printed(["--config=sdedit", "--config=fast", "--model.steps=17"], capsys)
    assert model["editor"]["class_path"].endswith(".SDEdit")
    fast = {"inversion_solver": "uni-inv", "guidance_begin": 0.0, "guidance_end": 0.8}
    assert {name: model[name] for name in fast} == fast
    assert (model["steps"], model["inversion_steps"]) == (17, None)
    alone = printed(["--config=fast"], capsys)
    assert alone["editor"]["class_path"].endswith(".PnP")
    assert alone["steps"] == 15


def test_the_paper_goes_with_every_editor(two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for names in (["sdedit", "paper"], ["paper"]):
        model = printed([f"--config={name}" for name in names], capsys)
        assert (model["fusion"], model["keyframe_attention"]) == (0.0, "full")


NAMELESS = [ROOT / "configs/ip_adapter.yaml", *sorted((ROOT / "configs/models").glob("*.yaml"))]


@pytest.mark.parametrize("file", NAMELESS, ids=lambda file: file.stem)
def test_a_configuration_without_a_model_is_whole(
    file: Path, two: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it says is taken, and its model must be named: nothing is fetched unasked."""
    model = printed([f"--config={file.relative_to(ROOT / 'configs')}"], capsys)
    written = yaml.safe_load(file.read_text())["model"]
    editor = written.pop("editor", {})
    assert {name: model[name] for name in written} == written
    assert model["editor"]["init_args"].items() >= editor.get("init_args", {}).items()
    with pytest.raises(ModelError, match=r"'path/to/[\w-]+' does not exist"):
        Backbone.load(model["backbone"])


def test_where_files_are(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(two))
    assert configs_first(["--config=~/one.yaml"]) == [f"--config={two / 'one.yaml'}"]
    cluster = INSTALLED / "cluster" / "predict.yaml"
    assert configs_first(["--config", "cluster/predict"]) == [f"--config={cluster}"]


@pytest.mark.parametrize("name", ["pnpp", "gone.yaml", "./gone", "../pnp"])
def test_a_name_of_none(two: Path, name: str) -> None:
    with pytest.raises(
        InputError,
        match=r"no configuration file .*: .*controlnet, ddcm, demo, .*, models/flux, .*pnp, re",
    ):
        configs_first(["--config", name])


@pytest.mark.parametrize("words", [["--config"], ["--config", "--model.steps=3"]])
def test_no_file_at_all(two: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["predict", *words])
    assert exit.value.code == 2
    assert "expected one argument" in capsys.readouterr().err


def test_a_wheel_holds_the_configurations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("configs", "tokenflow", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        (copy / name).symlink_to(ROOT / name)
    monkeypatch.chdir(copy)
    wheel = tmp_path / build_meta.build_wheel(str(tmp_path))
    with zipfile.ZipFile(wheel) as files:
        names = set(files.namelist())
        for file in (ROOT / "configs").rglob("*.*"):
            inside = f"tokenflow/configs/{file.relative_to(ROOT / 'configs')}"
            assert inside in names
            assert files.read(inside) == file.read_bytes()
