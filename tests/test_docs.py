"""The code blocks of the documentation are run, word for word; long commands are parsed."""

from __future__ import annotations

import configparser
import inspect
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tokenflow.engine.editing import Settings

from tests.conftest import ROOT
from tests.installing import install
from tokenflow.cli.main import main
from tokenflow.engine.lightning.data import Video
from tokenflow.engine.lightning.module import TokenFlow
from tokenflow.engine.lightning.run_writer import RunWriter

PAGES = ["docs/write-an-editor.md", "docs/write-a-kernel.md"]
READMES = ["README.md", "examples/tokenflow-local/README.md", "training/README.md"]
QUICK = ["--model.steps=1", "--data.max_frames=2", "--data.resolution=64"]


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page in one language, in their order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text(), re.DOTALL | re.M)


def languages(text: str) -> set[str]:
    """What a page's fences are labelled with, "" for one without a label."""
    fences = re.findall(r"^ *(?:```+|~~~+) *(.*?) *$", text, re.M)
    return set(fences[::2])  # every other one closes


def commands(page: str) -> list[str]:
    """The command lines of a page, each in one line and without its comment."""
    lines = "".join(blocks(page, "sh")).replace("\\\n", "").splitlines()
    return [shlex.join(shlex.split(line, comments=True)) for line in lines]


@pytest.mark.parametrize("command", [line for page in READMES for line in commands(page)])
def test_a_readmes_command_is_known(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [*shlex.split(command), "--print_config"])
    makefile = Path("Makefile").read_text()
    match shlex.split(command):
        case ["make", target]:
            assert f"\n{target}:" in makefile
        case ["pip", "install", folder]:
            assert Path(folder, "setup.cfg").exists()
        case ["tokenflow", "plugins", "check", _]:
            assert f"\t$(BIN)/{command}\n" in makefile, "make test runs it"
        case ["tokenflow", "predict", *_]:
            with pytest.raises(SystemExit, match=r"^0$"):
                main(sys.argv[1:])
        case ["python", "-m", module, *_]:
            del sys.argv[:2]
            with pytest.raises(SystemExit, match=r"^0$"):
                runpy.run_module(module, run_name="__main__")
        case _:
            pytest.fail("nothing looks it up")


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_followed_to_its_end(page: str, tmp_path: Path) -> None:
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}

    def run(*words: str, where: Path = tmp_path) -> str:
        done = subprocess.run(
            [sys.executable, *words], cwd=where, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    code = blocks(page, "python")
    assert len(code) == 3
    for number, block in enumerate(code):
        named = re.match(r"# (\w+\.py)\n", block)
        (tmp_path / (named[1] if named else f"block{number}.py")).write_text(block)
    (setup,) = blocks(page, "ini")
    groups = configparser.ConfigParser()
    groups.read_string(setup)
    offered = groups["options.entry_points"].items()
    install(tmp_path, "author", "".join(f"[{group}]{entries}\n" for group, entries in offered))

    for file in tmp_path.glob("test_*.py"):
        assert " passed" in run("-m", "pytest", "-q", "-p", "no:cacheprovider", str(file))
    for file in tmp_path.glob("block*.py"):
        run(str(file))
    (shell,) = blocks(page, "sh")
    commands = [shlex.split(line) for line in shell.splitlines()]
    check, predict = (command[1:] for command in commands)
    assert (check[0], predict[0]) == ("plugins", "predict")
    assert "all is well" in run("-m", "tokenflow.cli.main", *check, where=ROOT)
    out = f"--output.folder={tmp_path / 'runs'}"
    run("-m", "tokenflow.cli.main", *predict, *QUICK, out, where=ROOT)
    assert (tmp_path / "runs" / "blue_ball" / "edited.mp4").exists()


def test_no_block_is_left_out() -> None:
    """A page with code is one of those that are followed, or whose commands are looked up."""
    followed = {page: {"python", "ini", "sh"} for page in PAGES}
    followed |= {page: {"sh"} for page in READMES}
    followed["README.md"] |= {"python"}  # run by test_readme
    for page in (file for file in PROSE if file.suffix == ".md"):
        known = followed.get(str(page.relative_to(ROOT)), set())
        assert languages(page.read_text()) <= known, page
    assert languages("```sh\nls\n```\n\n  ```\nls\n  ```\n\n~~~ c++\n~~~\n") == {"sh", "", "c++"}


PROSE = [
    file
    for pattern in ("*.md", "docs/*.md", "examples/*.ipynb", "examples/*/*.md", "training/*.md")
    for file in ROOT.glob(pattern)
]


@pytest.mark.parametrize("file", PROSE, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_exist(file: Path) -> None:
    for link in re.findall(r"\]\((?!https?://)([^)#]+)", file.read_text()):
        assert (file.parent / link).exists(), link


@pytest.mark.parametrize("file", PROSE, ids=lambda p: str(p.relative_to(ROOT)))
def test_options_exist(file: Path) -> None:
    groups = {"model": (TokenFlow, Settings), "data": (Video,), "output": (RunWriter,)}
    for group, option in re.findall(r"--(model|data|output)\.(\w+)", file.read_text()):
        assert any(option in inspect.signature(c).parameters for c in groups[group]), option
