"""What a YAML file of somebody else's may hold, and what is refused before it fills the memory."""

from __future__ import annotations

import pytest

from tokenflow.errors import InputError
from tokenflow.storage.safe_yaml import DEPTH, parse_yaml


def doubling(first: str, line: str, levels: int) -> str:
    """Anchors a0, a1, …, each of which repeats the one before."""
    return first + "".join(line.format(i, i + 1) for i in range(levels))


LISTS = ("- &a0 [x, y]\n", "- &a{1} [*a{0}, *a{0}]\n")
MERGES = ("- &a0 {k: v}\n", "- &a{1} {{<<: [*a{0}, *a{0}]}}\n")


def test_plain_values_come_as_they_are() -> None:
    text = "a: [1, 2.5, -3, 'é', ~, true]\nb: {<<: {c: 1}, d: 0x10}"
    read = {"a": [1, 2.5, -3, "é", None, True], "b": {"c": 1, "d": 16}}
    assert parse_yaml(text, "it") == read
    assert parse_yaml("", "it") is None


def test_aliases_repeat_values() -> None:
    every = parse_yaml(doubling(*LISTS, 3), "it")
    assert every[1] == [["x", "y"]] * 2
    assert every[2] == [every[1]] * 2
    assert parse_yaml("- &a {k: v}\n- {<<: *a, m: n}", "it")[1] == {"k": "v", "m": "n"}


def test_as_many_values_as_the_bound_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenflow.storage.safe_yaml.NODES", 100)
    text = "[" + "a," * 99 + "]"  # and the list itself
    assert len(parse_yaml(text, "it")) == 99
    with pytest.raises(InputError, match="it is no YAML: expected at most 100 values"):
        parse_yaml(text.replace("]", "a]"), "it")


def test_as_deep_as_the_bound_is_read() -> None:
    parse_yaml("[" * DEPTH + "]" * DEPTH, "it")
    with pytest.raises(InputError, match=f"nested at most {DEPTH} deep"):
        parse_yaml("[" * (DEPTH + 1) + "]" * (DEPTH + 1), "it")


BAD = {
    "lists that aliases repeat": (doubling(*LISTS, 60), "expected at most"),
    "mappings that merges repeat": (doubling(*MERGES, 60), "expected at most"),
    "a list in itself": ("&a [*a]", r"expected no cycles, got \*a within itself"),
    "a mapping in itself": ("&a {b: {c: *a}}", "expected no cycles"),
    "too deep, in brackets": ("[" * 100_000, "is no YAML"),
    "too deep, in lines": ("- " * 100_000, "nested at most"),
    "400 digits": ("a: " + "4" * 400, "at most 64 bits, got 44444444444444444444…"),
    "5000 digits": ("a: " + "4" * 5000, "5000 digits"),
    "400 digits, hexadecimal": ("a: 0x" + "f" * 400, "at most 64 bits"),
    "an alias of nothing": ("*a", "undefined alias"),
    "a key twice": ("{a: 1, a: 2}", "expected each key once, got 'a' twice"),
    "a list for a key": ("? [a]\n: b", "unhashable key"),
    "two documents": ("a\n---\nb", "single document"),
    "no YAML": ("- {a", "is no YAML"),
    "code": ("!!python/object/apply:os.system [ls]", "could not determine a constructor"),
    "no date": ("a: 2020-13-45", "month must be in"),
    "a half of a character": (r'"\ud800"', "is no YAML"),
    "a NUL": ("\0", "is no YAML"),
    "no truth": ("!!bool maybe", "is no YAML"),
    "no number": ("!!int ''", "is no YAML"),
    "no time": ("!!timestamp x", "is no YAML"),
    "no mapping": ("!!map [1]", "is no YAML"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused(case: str) -> None:
    text, message = BAD[case]
    with pytest.raises(InputError, match=message):
        parse_yaml(text, "it")
