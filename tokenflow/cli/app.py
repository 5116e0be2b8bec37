"""`tokenflow app`: a page in the browser to edit in."""

from __future__ import annotations

from typing import NoReturn

from jsonargparse import ArgumentParser

from tokenflow.app.serving import Serving
from tokenflow.cli.stop import stop

DESCRIPTION = """\
Serves a page to edit in, on this machine: upload a clip, say what it shows and what the edit shows,
choose an editor, watch, compare, and take the video or the command line along. Needs Gradio:
pip install 'tokenflow[app]'."""


class Parser(ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        stop(f"{message}\nsee tokenflow app --help")


def parser() -> ArgumentParser:
    """The command's options, which the environment has as TOKENFLOW_APP_PASSWORD and so on."""
    made = Parser(
        prog="tokenflow app", description=DESCRIPTION, default_env=True, env_prefix="TOKENFLOW_APP"
    )
    made.add_class_arguments(Serving, None)
    return made


def run(words: list[str]) -> None:
    """Parses the words after `tokenflow app`, and serves until Ctrl-C.

    Raises:
        InputError: An option is out of its range, or Gradio is not installed.
    """
    made = parser()
    given = made.parse_args(words)
    serving = Serving(**vars(made.instantiate(given)))
    from tokenflow.app.server import serve  # late: torch is imported with it
    from tokenflow.cli.allowlist import restrict
    from tokenflow.cli.predict import quiet

    restrict()
    quiet()
    serve(serving)
