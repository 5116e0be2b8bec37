"""YAML that others wrote, as manifests and records of runs: whatever it holds, it stays small."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import yaml

from tokenflow.errors import InputError

NODES = 1_000_000
"""Values that a file may have, each counted as often as aliases repeat it."""
DEPTH = 100
"""How deep lists and mappings may be nested."""
LARGEST = 2**64
"""What whole numbers are below; others overflow wherever they are used."""
OF_TAGS = (ArithmeticError, AttributeError, LookupError, TypeError)
"""What PyYAML raises of a value that its tag does not fit, as `!!bool maybe`."""

Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's is ten times as fast


def parse_yaml(text: str, what: str) -> Any:
    """What a YAML text holds, in plain types.

    Args:
        text: One document.
        what: What errors call it, like "the manifest clips.yaml".

    Raises:
        InputError: It is no YAML, has a key twice, has more than `NODES` values, is nested deeper
            than `DEPTH`, holds itself, or a number of more than 64 bits.
    """
    try:
        require_small(yaml.parse(text, Loader))
        return yaml.load(text, CheckedLoader)
    except (yaml.YAMLError, ValueError, *OF_TAGS) as error:
        raise InputError(f"{what} is no YAML: {error}") from error


def require_small(events: Iterable[Any]) -> None:
    """Raises `ValueError` for a document that is too large, too deep, or holds itself."""
    nodes = 0
    around: list[tuple[str | None, int]] = []  # anchor and first node of what is open
    sizes: dict[str | None, int] = {}
    for event in events:
        if isinstance(event, yaml.AliasEvent):
            if any(event.anchor == anchor for anchor, _ in around):
                raise ValueError(f"expected no cycles, got *{event.anchor} within itself")
            nodes += sizes.get(event.anchor, 0)
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, first = around.pop()
            sizes[anchor] = nodes - first
        elif isinstance(event, yaml.NodeEvent):
            if isinstance(event, yaml.CollectionStartEvent):
                around.append((event.anchor, nodes))
            else:
                sizes[event.anchor] = 1
            nodes += 1
        if nodes > NODES:
            raise ValueError(f"expected at most {NODES} values, as often as aliases repeat them")
        if len(around) > DEPTH:
            raise ValueError(f"expected lists and mappings nested at most {DEPTH} deep")


class CheckedLoader(Loader):
    """Refuses a key that comes twice, of which others take the last, and numbers that overflow."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        require_once([str(key.value) for key, _ in node.value])
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: Any) -> int:
        number: int = super().construct_yaml_int(node)
        if abs(number) >= LARGEST:
            raise ValueError(f"expected numbers of at most 64 bits, got {node.value:.20}…")
        return number


CheckedLoader.add_constructor("tag:yaml.org,2002:int", CheckedLoader.construct_yaml_int)


def require_once(names: Iterable[str]) -> None:
    """Raises `ValueError` for a name that comes again."""
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"expected each key once, got {twice[0]!r} twice")
