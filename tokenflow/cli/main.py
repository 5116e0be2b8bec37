"""The command line: `tokenflow predict …` is Lightning's, the rest are small commands."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from importlib.metadata import version
from typing import Any, NoReturn

from tokenflow.cli.stop import HELP, stop
from tokenflow.errors import InputError, Interrupted, Preempted
from tokenflow.text import printable_lines

USAGE = """\
usage: tokenflow COMMAND [OPTIONS]

Edits videos by text with a frozen image model, consistently over time.

commands:
  predict   edit a video: tokenflow predict --data.video in.mp4 --model.prompt "a blue ball"
  app       open a page to edit in, on this machine: tokenflow app
  evaluate  measure runs, or a video beside its source: tokenflow evaluate runs/in
  report    make a run's page again, or compare runs: tokenflow report RUN… --output page.html
  cache     list what is kept between runs; tokenflow cache prune --leave 5 makes it less
  plugins   list editors and kernels; tokenflow plugins check tests them
  doctor    show versions, accelerator and codecs, and what is wrong with them

Options of a command: tokenflow COMMAND --help; the version: tokenflow --version
"""


def main(args: Sequence[str] | None = None) -> None:
    """Runs one command; what a user can mend is printed without a traceback, exit code 2.

    Ctrl-C ends it, cleaning up, with exit code 130; SIGTERM and SIGUSR1 with 75, "try again".
    """
    before = {number: signal.signal(number, does) for number, does in SIGNALS.items()}
    warnings.formatwarning, formatted = warning_line, warnings.formatwarning
    try:
        dispatch(list(sys.argv[1:] if args is None else args))
        sys.stdout.flush()
    except Interrupted:
        print("tokenflow: interrupted", file=sys.stderr)
        raise
    except Preempted:
        print("tokenflow: stopped on request; start the same command again", file=sys.stderr)
        raise
    except BrokenPipeError:  # of `tokenflow … | head`; what is left must not be flushed into it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None
    finally:
        warnings.formatwarning = formatted
        for number, handler in before.items():
            signal.signal(number, handler)


def warning_line(message: Warning | str, *_: Any, **__: Any) -> str:
    """A warning as users read it, without the place in the code that gave it."""
    return f"{printable_lines(f'tokenflow: warning: {message}')}\n"


def interrupt(*_: Any) -> NoReturn:
    """What Ctrl-C does."""
    raise Interrupted(128 + signal.SIGINT)


def stop_at_once(*_: Any) -> NoReturn:
    """What a scheduler's signal does while there is nothing to keep."""
    raise Preempted


SIGNALS = {
    signal.SIGINT: interrupt,
    signal.SIGTERM: stop_at_once,
    signal.SIGUSR1: stop_at_once,
}


def dispatch(words: list[str]) -> None:
    """Finds the command and runs it."""
    command = words[0] if words else "--help"
    if command in HELP:
        print(USAGE, end="")
        return
    if command == "--version":
        print(f"tokenflow {version('tokenflow')}")
        return
    if command not in COMMANDS:
        stop(f"there is no command {command!r}; expected {', '.join(COMMANDS)}")
    try:
        COMMANDS[command](words[1:])
    except InputError as error:
        stop(str(error))


def call(command: str, words: list[str]) -> None:
    """Runs the words after a command, whose module is imported only now."""
    if (code := import_module(f"tokenflow.cli.{command}").run(words)) is not None:
        raise SystemExit(code)


def predict(words: list[str]) -> None:
    """Edits a video, through Lightning's command line."""
    from tokenflow.cli import options

    if any(word in HELP for word in words):
        options.print_help()
        return
    options.check(words)
    call("predict", words)


def evaluate(words: list[str]) -> None:
    """Measures finished runs, or a pair of videos."""
    if not words:
        stop("expected folders of runs, or --source and --edited; see tokenflow evaluate --help")
    call("evaluate", words)


COMMANDS: dict[str, Callable[[list[str]], Any]] = {
    "predict": predict,
    "evaluate": evaluate,
    **{name: partial(call, name) for name in ("app", "report", "cache", "plugins", "doctor")},
}

if __name__ == "__main__":
    main()
