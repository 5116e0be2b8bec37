"""What is said before anything heavy is imported: help, and what a command line lacks."""

from __future__ import annotations

import inspect
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub.utils import logging as hub_logging

from tests.conftest import ROOT
from tokenflow.cli.main import main
from tokenflow.cli.options import CLASSES, check, group_options
from tokenflow.engine.lightning.data import Video
from tokenflow.engine.lightning.metrics import Measuring
from tokenflow.engine.lightning.module import TokenFlowModule
from tokenflow.engine.lightning.run_writer import RunWriter
from tokenflow.engine.settings import Settings
from tokenflow.errors import InputError
from tokenflow.metrics import Measures

KINDS = {
    "data": (Video,),
    "model": (TokenFlowModule, Settings),
    "output": (RunWriter,),
    "metrics": (Measuring, Measures),
}
HEAVY = ("torch", "lightning", "diffusers", "transformers", "torchmetrics")


@pytest.mark.parametrize("group", KINDS)
def test_the_help_has_every_option_of_the_classes_and_its_default(group: str) -> None:
    keywords = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    true = {
        name: None if p.default is p.empty else p.default
        for kind in KINDS[group]
        for name, p in inspect.signature(kind).parameters.items()
        if p.kind not in keywords
    }
    assert {name: option.default for name, option in group_options(group).items()} == true
    assert [kind.__name__ for kind in KINDS[group]] == [name for _, name in CLASSES[group]]


def test_predict_help_is_whole_and_says_nothing_of_training(
    capsys: pytest.CaptureFixture[str],
) -> None:
    main(["predict", "--data.video=in.mp4", "--help"])
    text = capsys.readouterr().out
    for group in CLASSES:
        for name in group_options(group):
            assert f"  --{group}.{name} " in text, name
    assert "PnP" in text
    assert not re.search(r"\b(train|training|fit|epoch)\b", text.replace("--data.fit", ""))


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["predict", "--help"], 0),
        (["predict"], 2),
        (["predict", "--data.video=in.mp4"], 2),
        (["predict", "--model.stepz=3"], 2),
        (["evaluate"], 2),
        (["report", "--help"], 0),
        (["report", "a", "b"], 2),
        (["cache", "--help"], 0),
        (["cache", "--folder=."], 0),
        (["plugins"], 0),
        (["plugins", "check", "--help"], 0),
        (["plugins", "check", "pnp"], 2),
        (["doctor"], 0),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_command_that_edits_nothing_imports_nothing_heavy(
    words: list[str], code: int, tmp_path: Path
) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "tokenflow.cli", *words]
    places: dict[str, Any] = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(ROOT)}}
    done = subprocess.run(command, capture_output=True, text=True, check=False, **places)
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if "|" in line}
    assert done.returncode == code, done.stderr
    assert "tokenflow.cli.main" in imported
    assert not imported & {*HEAVY}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "expected --data.video, or --data.manifest for many, got neither"),
        (["--data.video=a.mp4"], "the prompt is empty"),
        (["--data.vido=a.mp4"], r"Video has no option 'vido'; did you mean video; its options"),
        (["--metrics.maks", "x"], r"Measuring has no option 'maks'; did you mean mask; .*lpips"),
        (["--config=half.yaml"], "the prompt is empty"),
        (["--config=gone.yaml"], "there is no configuration file gone.yaml"),
    ],
)
def test_what_a_command_line_lacks(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("half.yaml").write_text("data: {video: a.mp4}")
    with pytest.raises(InputError, match=message):
        check(words)


@pytest.mark.parametrize(
    "words",
    [
        ["--data.manifest=clips.yaml"],
        ["--data.video", "a.mp4", "--model.prompt", "a ball"],
        ["--config=whole.yaml"],
        ["--config", "half.yaml", "--model.prompt=a ball"],
        ["--data=group.yaml", "--model.prompt=a ball"],
        ["--config=no.yaml"],  # whose error is the parser's
        ["--model.pro=a ball", "--data.vid=a.mp4"],  # as argparse abbreviates
        ["--print_config"],
        ["--model.editor.help", "PnP"],
    ],
)
def test_a_command_line_that_may_be_whole(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("half.yaml").write_text("data: {video: a.mp4}")
    Path("group.yaml").write_text("video: a.mp4")
    Path("whole.yaml").write_text("data: {manifest: a.csv}\nmodel: {editor: PnP}")
    Path("no.yaml").write_text("a: b: c")
    check(words)


def test_the_environment_gives_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENFLOW_PREDICT__DATA__VIDEO", "a.mp4")
    with pytest.raises(InputError, match="the prompt is empty"):
        check([])
    monkeypatch.setenv("TOKENFLOW_PREDICT__MODEL__PROMPT", "a ball")
    check([])
    monkeypatch.delenv("TOKENFLOW_PREDICT__DATA__VIDEO")
    monkeypatch.setenv("TOKENFLOW_PREDICT__CONFIG", "any.yaml")
    check([])


def test_a_misspelt_option_in_a_file_names_its_class(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.yaml").write_text("model: {prompt: a ball, stepz: 3}\ndata: {video: a.mp4}")
    with pytest.raises(SystemExit):
        main(["predict", f"--config={tmp_path / 'bad.yaml'}"])
    err = capsys.readouterr().err
    assert "TokenFlowModule has no option 'stepz'" in err
    assert "did you mean steps; its options are editor, " in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.editor=Pnp"], "there is no editor 'Pnp'; did you mean PnP; installed are: "),
        (["--model.propagation", "NNFeild"], "there is no kernel 'NNFeild'; did you mean NNField"),
        (["--model.editor.atention=1"], "PnP has no option 'atention'; did you mean attention"),
        (
            ["--model.editor=SDEdit", "--model.editor.init_args.stren", "1"],
            "did you mean strength; its options are strength, noise",
        ),
        (["--model.editor={class_path: SDEdit, init_args: {atention: 1}}"], "SDEdit has no option"),
        (["--config=editor.yaml"], "PnP has no option 'feetures'; did you mean features"),
        (["--config=list.yaml"], "expected init_args of editor as a mapping"),
        (["--model=text.yaml"], "Not a valid subclass of Propagation. Got .*'init_args': 'abc'"),
        (["--model.editor={class_path: PnP, init_args: {1: 2}}"], "must be a string, got: 1"),
    ],
)
def test_a_misspelt_editor_or_option_of_one(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("editor.yaml").write_text("model: {editor: {class_path: PnP, init_args: {feetures: 1}}}")
    Path("list.yaml").write_text("model: {editor: {class_path: PnP, init_args: [a]}}")
    Path("text.yaml").write_text("propagation: {init_args: abc}")
    with pytest.raises(SystemExit) as exit:
        main(["predict", "--data.video=in.mp4", "--model.prompt=a ball", *words])
    assert exit.value.code == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TOKENFLOW_PREDICT__MODEL__EDITOR", "SDEdit"),
        ("TOKENFLOW_PREDICT__CONFIG", "sdedit.yaml"),
        (None, None),
    ],
)
def test_options_are_of_the_editor_that_is_chosen_wherever(
    name: str | None,
    value: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sdedit.yaml").write_text("model: {editor: SDEdit}")
    words = ["--model.editor.strength=0.3", "--print_config"]
    if name is not None:
        monkeypatch.setenv(name, value)
    else:
        words = ["--print_config", "--model.editor=SDEdit", words[0]]
    with pytest.raises(SystemExit) as exit:
        main(["predict", *words])
    out, err = capsys.readouterr()
    assert exit.value.code == 0, err
    assert yaml.safe_load(out)["model"]["editor"]["init_args"]["strength"] == 0.3


def test_a_wrong_hub_id_gives_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    video = ROOT / "tokenflow" / "miniature" / "demo" / "blue_ball.mp4"
    hub_logging.set_verbosity_warning()  # as the hub's client has it, which warns of each retry
    with pytest.raises(SystemExit) as exit:
        main([
            "predict", f"--data.video={video}", "--model.prompt=a ball",
            "--model.backbone=nobody/nothing", "--trainer.accelerator=cpu",
        ])  # fmt: skip
    assert exit.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("tokenflow: ") == err.count("tokenflow: error: ") == 1
    assert err.startswith(
        "fetching nobody/nothing from the hub, unless it is cached\ntokenflow: error"
    )
    assert hub_logging.get_verbosity() == logging.ERROR
