"""`--config` of `tokenflow predict`: files, or names of those that come with the package."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from tokenflow.errors import InputError
from tokenflow.storage.paths import local

INSTALLED = Path(__file__).parents[1] / "configs"
"""A link in the repository, a folder in an installation."""
OPTIONS = ("--config", "-c")
NAME = re.compile(r"[\w./-]+")


def configs_first(words: Sequence[str]) -> list[str]:
    """The words with every `--config FILE` first, in their order, so that the others overrule them.

    Raises:
        InputError: There is no such file, and none is installed by this name.
    """
    configs, rest, left = [], [], list(words)
    while left:
        word = left.pop(0)
        name, equals, value = word.partition("=")
        if name not in OPTIONS or not (equals or (left and not left[0].startswith("-"))):
            rest.append(word)  # among them a --config without a file, which argparse tells
            continue
        configs.append(f"--config={found(value if equals else left.pop(0))}")
    return [*configs, *rest]


def found(config: str) -> str:
    """The path of a configuration; what can be neither path nor name is given back as it is.

    Raises:
        InputError: There is no such file, and none is installed by this name.
    """
    path = local(config)
    if path.exists() or not NAME.fullmatch(config):
        return str(path) if path.exists() else config
    names = {str(file.relative_to(INSTALLED).with_suffix("")): file for file in installed()}
    if file := names.get(config.removesuffix(".yaml")):
        return str(file)
    raise InputError(
        f"there is no configuration file {config}; expected a YAML file for --config, or the name "
        f"of an installed one: {', '.join(names)}"
    )


def installed() -> list[Path]:
    """The configurations that come with the package."""
    return sorted(INSTALLED.rglob("*.yaml"))
