"""What a plugin's answer must be: each contract yields what an answer breaks of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from tokenflow.errors import PluginError


class Violation(NamedTuple):
    """A rule that an answer breaks: what was expected, what came, what its author can do."""

    rule: str
    expected: str
    got: object
    advice: str


def require_none(violations: Iterable[Violation], who: str) -> None:
    """Raises `PluginError` with the first violation; `who` names the plugin and where it was."""
    for _, expected, got, advice in violations:
        raise PluginError(f"{who}: expected {expected}, got {got}; fix the plugin: {advice}")
