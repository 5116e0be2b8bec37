"""`tokenflow report`: a run's page again, or a page of several runs."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from jsonargparse import ArgumentParser

from tokenflow.cli.configurations import split_allowed
from tokenflow.cli.stop import stop
from tokenflow.errors import InputError
from tokenflow.storage.paths import local

DESCRIPTION = """\
Makes the page of a finished run again, as after `tokenflow evaluate`, or with pictures of its
features; or one page of several runs, with their videos, metrics and the settings that differ."""


class Parser(ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        stop(f"{message}\nsee tokenflow report --help")


def parser() -> Parser:
    """The command's options."""
    made = Parser(prog="tokenflow report", description=DESCRIPTION)
    made.add_argument("runs", metavar="RUN", nargs="+", type=str, help="A run's folder.")
    made.add_argument(
        "--output", type=str | None, help="The page; report.html in the folder of a single run."
    )
    made.add_argument(
        "--features",
        action="store_true",
        help="Also show the features of one self-attention layer and where its tokens come from; "
        "takes up to the time of inversion and sampling. As with predict, --allow_imports PACKAGE "
        "lets the run's configuration name classes of another package.",
    )
    made.add_argument(
        "--site", type=str | None, help="Which layer; one in the middle of the decoder by default."
    )
    made.add_argument(
        "--step", type=int | None, help="At which step of sampling, from 0; the middle by default."
    )
    made.add_argument(
        "--frame",
        type=int | None,
        help="Whose tokens to follow, from 0; by default the frame farthest from its keyframes.",
    )
    return made


def run(words: list[str]) -> None:
    """Parses the words after `tokenflow report`, and writes the page.

    Raises:
        InputError: The words make no sense together, or a folder holds no finished run.
    """
    words, allowed = split_allowed(words)
    options = parser().parse_args(words)
    output = check_output(options.output)
    chosen = (options.site, options.step, options.frame)
    if not options.features and any(value is not None for value in chosen):
        raise InputError("--site, --step and --frame are of --features; give that, too")
    if len(options.runs) > 1 and options.features:
        raise InputError(f"--features is for one run, got {len(options.runs)}")
    if len(options.runs) > 1 and output is None:
        raise InputError("expected --output PAGE.html for the page of several runs")
    from tokenflow.cli.pages import several, single  # late: torch is imported with it

    if len(options.runs) > 1 and output is not None:
        several(options.runs, output)
    else:
        single(options, allowed, output)


def check_output(output: str | None) -> Path | None:
    """The page's path, which must end in .html: a slip of the keys must not cost a video.

    Raises:
        InputError: It does not.
    """
    if output is not None and Path(output).suffix.lower() not in (".html", ".htm"):
        raise InputError(f"--output is a page, expected a name that ends in .html, got {output!r}")
    return None if output is None else local(output)
