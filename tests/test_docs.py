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
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.installing import install
from tokenflow.cli.main import main
from tokenflow.engine import Settings
from tokenflow.engine.lightning.data import Video
from tokenflow.engine.lightning.module import TokenFlowModule
from tokenflow.engine.lightning.run_writer import RunWriter
from tokenflow.plugins import installed_plugins
from tokenflow.testing.checks import Check

PAGES = ["docs/write-an-editor.md", "docs/write-a-kernel.md", "docs/write-a-backbone.md"]
READMES = [
    "README.md",
    "docs/miniature.md",
    "examples/tokenflow-local/README.md",
    "training/README.md",
]
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
        case ["tokenflow", "plugins", "check", name]:
            assert name in {plugin.name for plugin in installed_plugins()}
        case ["tokenflow", "predict", *_]:
            with pytest.raises(SystemExit, match=r"^0$"):
                main(sys.argv[1:])
        case ["tokenflow", "app"]:
            with pytest.raises(SystemExit, match=r"^0$"):
                main(["app", "--help"])
        case ["python", "-m", module, *_]:
            del sys.argv[:2]
            with pytest.raises(SystemExit, match=r"^0$"):
                runpy.run_module(module, run_name="__main__")
        case _:
            pytest.fail("nothing looks it up")


@pytest.fixture
def author(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder whose modules and entry points are installed for the length of a test."""
    monkeypatch.syspath_prepend(tmp_path)
    installed_plugins.cache_clear()
    yield tmp_path
    installed_plugins.cache_clear()
    for file in tmp_path.glob("*.py"):
        sys.modules.pop(file.stem, None)


@pytest.mark.full
@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_followed_to_its_end(
    page: str, author: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = blocks(page, "python")
    assert len(code) >= 3
    named = {m[1]: block for block in code if (m := re.match(r"# (\w+\.py)\n", block))}
    for name, block in named.items():
        (author / name).write_text(block)
    for block in blocks(page, "json"):  # a model's folder, beside which its commands are given
        (author / "gaussian").mkdir()
        (author / "gaussian" / "model_index.json").write_text(block)
    (setup,) = blocks(page, "ini")
    groups = configparser.ConfigParser()
    groups.read_string(setup)
    offered = groups["options.entry_points"].items()
    install(author, "author", "".join(f"[{group}]{entries}\n" for group, entries in offered))

    (tests,) = author.glob("test_*.py")
    path = os.pathsep.join([str(author), str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)],
        cwd=author, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None, done.stdout

    # pytest ran the kit; the other ways to call it have to reach the same checks, not run them
    reached: list[str] = []
    monkeypatch.setattr(Check, "__call__", lambda check: reached.append(check.__name__))
    monkeypatch.chdir(ROOT)
    for block in set(code) - set(named.values()):
        exec(block, {})
    by_call = reached.copy()
    assert len(by_call) == int(passed[1])
    reached.clear()
    (shell,) = blocks(page, "sh")
    shell = re.sub(r" gaussian\b", f" {author / 'gaussian'}", shell)
    check, predict = (shlex.split(line)[1:] for line in shell.splitlines())
    assert (check[0], predict[0]) == ("plugins", "predict")
    with pytest.raises(SystemExit, match=r"^0$"):
        main(check)
    assert "all is well" in capsys.readouterr().out
    assert reached == by_call
    main([*predict, *QUICK, f"--output.folder={author / 'runs'}"])
    assert (author / "runs" / "blue_ball" / "edited.mp4").exists()


def test_no_block_is_left_out() -> None:
    """A page with code is one of those that are followed, or whose commands are looked up."""
    followed = {page: {"python", "ini", "sh"} for page in PAGES}
    followed["docs/write-a-backbone.md"] |= {"json"}
    followed |= {page: {"sh"} for page in READMES}
    followed["README.md"] |= {"python"}  # run by test_readme
    followed["docs/architecture.md"] = {"text"}  # a drawing
    for page in (file for file in PROSE if file.suffix == ".md"):
        known = followed.get(str(page.relative_to(ROOT)), set())
        assert languages(page.read_text()) <= known, page
    assert languages("```sh\nls\n```\n\n  ```\nls\n  ```\n\n~~~ c++\n~~~\n") == {"sh", "", "c++"}


def test_the_table_of_models_is_that_of_what_is_registered() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "models.py"))
    text = (ROOT / "docs" / "models.md").read_text()
    assert text == made["page"](text), "python docs/models.py writes it anew"
    assert made["table"]().count("Pipeline`") == 4
    listed = {name for name in re.findall(r"`(models/[\w-]+)`", text)}
    assert listed == {f"models/{file.stem}" for file in (ROOT / "configs/models").glob("*.yaml")}


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
    groups = {"model": (TokenFlowModule, Settings), "data": (Video,), "output": (RunWriter,)}
    for group, option in re.findall(r"--(model|data|output)\.(\w+)", file.read_text()):
        assert any(option in inspect.signature(c).parameters for c in groups[group]), option
