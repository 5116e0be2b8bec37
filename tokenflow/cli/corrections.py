"""A parser's message about an editor or kernel, with the name that was meant."""

from __future__ import annotations

import re

from jsonargparse import ArgumentParser

from tokenflow.cli.options import CLASSES, PLUGINS
from tokenflow.cli.plugins import KINDS
from tokenflow.plugins import describe, did_you_mean, installed_plugins, no_option

OPTION = re.compile(r"Option '(\w+)\S*' is not accepted")
NAME = re.compile(r"Expected a dot import path string: (\w+)")


def corrected(parser: ArgumentParser, message: str) -> str:
    """The message, with the closest name there is, and with what is installed.

    Args:
        parser: Which says it: jsonargparse makes one for each class, with a group of its name.
        message: As jsonargparse words it.
    """
    if inner := re.search(r"\w+ has no option .*", message):  # of a parser within this one
        return inner[0]
    kind = next(iter(parser.groups or ()), "")
    if (unknown := OPTION.fullmatch(message)) and kind not in ("", *CLASSES):
        return no_option(unknown[1], kind, list(vars(parser.get_defaults())))
    for option, group in PLUGINS.items():
        if not re.search(rf'"(model\.)?{option}"', message):
            continue
        if message.endswith("object has no attribute 'keys'"):
            return f"expected init_args of {option} as a mapping from names to values"
        plugins = [p for p in installed_plugins() if p.group == group]
        names = [p.name for p in plugins]
        if (named := NAME.search(message)) and named[1] not in names:
            close = did_you_mean(named[1], names)
            return f"there is no {KINDS[group]} {named[1]!r}{close}; {describe(plugins)}"
        return f"{message}\n{describe(plugins)}"
    return message
