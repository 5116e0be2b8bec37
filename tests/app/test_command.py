"""`tokenflow app` on the command line."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from tokenflow.app import server
from tokenflow.app.serving import Serving
from tokenflow.cli.main import main
from tokenflow.errors import InputError


def test_its_options_reach_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = list[Serving]()
    monkeypatch.setattr(server, "serve", given.append)
    monkeypatch.setenv("TOKENFLOW_APP_PASSWORD", "a long one")
    words = ["--folder", str(tmp_path), "--models", "[miniature, some/model]", "--share", "true"]
    main(["app", *words])
    (serving,) = given
    assert serving.models == ["miniature", "some/model"]
    assert (serving.share, serving.password) == (True, "a long one")


def test_its_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["app", "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert all(f"--{name}" in said for name in Serving.__dataclass_fields__)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--share", "true"], "expected a --password"),
        (["--max_frames", "0"], "--max_frames must be at least 1"),
        (["--colour", "red"], "see tokenflow app --help"),
    ],
)
def test_what_it_refuses(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["app", *words])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_without_gradio_it_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(InputError, match=r"pip install 'tokenflow\[app\]'"):
        server.serve(Serving(str(tmp_path)))


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(InputError, match="choose another --port"):
            server.serve(Serving(str(tmp_path), port=other.getsockname()[1]), block=False)
