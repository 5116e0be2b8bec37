"""Words that are about configurations: which files, and which packages these may name."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from tokenflow.errors import InputError
from tokenflow.plugins import OPTION
from tokenflow.storage.paths import local

INSTALLED = Path(__file__).parents[1] / "configs"
"""A link in the repository, a folder in an installation."""
GROUPS = ("--data", "--metrics", "--model", "--output", "--trainer")
"""Options that take a file as well, of a part of the configuration."""
NAME = re.compile(r"[\w./-]+")


def split_allowed(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words without every `--allow_imports PACKAGE`, and the packages.

    They are taken from the command line before anything is parsed: a YAML file or an environment
    variable has no such option.
    """
    rest, allowed, following = [], [], iter(words)
    for word in following:
        name, equals, value = word.partition("=")
        if name != OPTION:
            rest.append(word)
            continue
        value = value if equals else next(following, "")
        if not all(part.isidentifier() for part in value.split(".")):
            raise InputError(
                f"{OPTION} expects a package or a class, like mypackage or mypackage.MyCallback, "
                f"got {value!r}; repeat the option for several"
            )
        allowed.append(value)
    return rest, allowed


def configs_first(words: Sequence[str]) -> list[str]:
    """The words with every `--config FILE` first, then those of a part, so that the others overrule
    them.

    Raises:
        InputError: There is no such file, and none is installed by this name.
    """
    configs, parts, rest, left = [], [], [], list(words)
    while left:
        word = left.pop(0)
        if word.startswith("-c") and len(word) > 2:
            word = f"--config={word[2:].removeprefix('=')}"
        name, equals, value = word.partition("=")
        whole = name == "-c" or (name.startswith("--c") and "--config".startswith(name))
        follows = equals or (left and not left[0].startswith("-"))
        if not follows or not (whole or name in GROUPS):
            rest.append(word)  # argparse reports a --config without a file
            continue
        value = value if equals else left.pop(0)
        if whole:
            configs.append(f"--config={found(value)}")
        else:
            parts.append(f"{name}={value}")
    return [*configs, *parts, *rest]


def found(config: str) -> str:
    """The path of a configuration; what can be neither path nor name is given back as it is.

    Raises:
        InputError: There is no such file, and none is installed by this name.
    """
    path = local(config)
    if os.path.exists(path):  # unlike Path's own, of no name that is too long
        return str(path)
    if not NAME.fullmatch(config):
        return config
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
