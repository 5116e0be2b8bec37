"""`tokenflow plugins`: what is installed, and whether it keeps its contract."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tokenflow.cli.stop import HELP
from tokenflow.errors import InputError
from tokenflow.plugins import (
    BACKBONES,
    Plugin,
    describe,
    did_you_mean,
    installed_plugins,
    offered_backbones,
    offered_plugins,
)
from tokenflow.text import printable

KINDS = {"tokenflow.editors": "editor", "tokenflow.propagation": "kernel", BACKBONES: "backbone"}
USAGE = """\
usage: tokenflow plugins
       tokenflow plugins check
       tokenflow plugins check NAME [OPTIONS of the plugin]

Lists the editors, kernels and backbones that packages offer, without importing them. With check,
imports all and lists which are usable; exit code 1 if one is not. With a name, makes that plugin
with the given options, which tokenflow plugins check NAME --help lists, and tests it against its
contract; a backbone is made from a model of its family, --model FOLDER.
"""


def run(words: list[str]) -> int | None:
    """Runs the words after `tokenflow plugins`; returns the exit code, None after help.

    Raises:
        InputError: The words are no such command, or name no plugin.
    """
    if words[-1:] and words[-1] in HELP and words[:-1] in ([], ["check"]):
        print(USAGE, end="")
        return None
    if not words:
        offered = (*offered_plugins(), *offered_backbones())
        show(offered, "class", lambda p: p.reason or p.path)
        print("tokenflow plugins check imports each of them and lists which are usable")
        return 0
    if words[0] != "check":
        raise InputError(
            f"expected tokenflow plugins, or tokenflow plugins check, got {' '.join(words)!r}"
        )
    if len(words) > 1:
        return check(words[1], words[2:])
    from tokenflow.cli.check import installed_backbones  # late: it imports all that edits need

    found = (*installed_plugins(), *installed_backbones())
    show(found, "state", lambda p: f"unusable: {p.reason}" if p.reason else "usable")
    return 0 if all(plugin.usable for plugin in found) else 1


def show(plugins: Sequence[Plugin], heading: str, last: Callable[[Plugin], str]) -> None:
    """Prints a line for each plugin, with `last` under `heading` in the last column."""
    rows = [("name", "kind", "package", heading)] + [
        (p.name, KINDS[p.group], p.distribution, printable(last(p))) for p in plugins
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(map(str.ljust, row, widths)).rstrip())


def check(name: str, options: list[str]) -> int:
    """Runs the kit on a name's plugins, made with these options; 1 if anything fails, else 0."""
    offered = (*offered_plugins(), *offered_backbones())
    names = [plugin.name for plugin in offered]
    if name not in names:
        close = did_you_mean(name, names)
        raise InputError(f"there is no plugin {name!r}{close}; {describe(offered)}")
    from tokenflow.cli.check import backbone_verdict, installed_backbones, verdict  # late, as above

    backbones = [p for p in installed_backbones() if p.name == name]
    codes = [backbone_verdict(p, options) for p in backbones]
    return max(codes + [verdict(p, options) for p in installed_plugins() if p.name == name])
