"""Options by typed constructors: which the page offers, and which it must not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest

from tokenflow.app.options import Option, options_of
from tokenflow.editors import ControlNet, Editor, PnP, SDEdit
from tokenflow.engine import Settings
from tokenflow.errors import InputError
from tokenflow.propagation import FlowWeighted


class Theirs(Editor):
    """An editor of somebody else's.

    Args:
        share: How much, 0 to 1.
        way: "one" or "another".
        word: Any words.
        mask: A file.
        place: A path.
        hook: A function.
        anything: Whatever.
        sizes: Several.
        kind: Which.
        count: How many, or None.
        needed: Without a default.
    """

    def __init__(
        self,
        needed: int,
        share: float = 0.5,
        way: str = "one",
        word: str = "a",
        mask: str | None = None,
        place: Path | None = None,
        hook: Callable[[], None] | None = None,
        anything: Any = None,
        sizes: tuple[int, ...] = (1,),
        kind: Literal["a", "b"] = "a",
        count: int | None = None,
        **more: Any,
    ) -> None:
        pass


def test_free_text_paths_and_functions_are_not_offered() -> None:
    found = {one.name: one for one in options_of(Theirs)}
    assert list(found) == ["share", "way", "kind", "count"]
    assert found["share"].share
    assert found["way"].choices == ("one", "another")
    assert found["kind"].choices == ("a", "b")
    assert found["count"] == Option("count", "whole", None, "How many, or None.", (), True)


@pytest.mark.parametrize(
    ("about", "share"),
    [
        ("A share, 0 to 1.", True),
        ("Above 0 and up to 1: of N steps", False),
        ("Strength, above 0 and up to 1: of N", True),
        ("How many, 0 to 10.", False),
        ("From 0 to 1.5.", False),
        ("From -10 to 1.", False),
        ("From 10 to 1.", False),
        ("From 0.0 to 1.", False),
    ],
)
def test_a_share_is_from_0_to_1_exactly(about: str, share: bool) -> None:
    assert Option("n", "number", 0.5, about).share is share


def test_classes_that_need_files_of_the_servers_are_not_offered() -> None:
    (flow,) = [one for one in options_of(FlowWeighted) if one.kind == "class"]
    assert flow.choices == ("DIS",)
    (condition,) = [one for one in options_of(ControlNet) if one.kind == "class"]
    assert condition.choices == ("Canny", "ControlVideo")


def test_settings_and_editors_are_offered_whole() -> None:
    names = {one.name for one in options_of(Settings)}
    assert {"steps", "seed", "blend", "keyframes", "inversion_solver", "guidance"} <= names
    assert [one.name for one in options_of(PnP)] == [
        "attention", "features", "feature_layers", "start_from", "inject_values",
    ]  # fmt: skip
    assert all(one.about for one in options_of(Settings))
    assert next(one for one in options_of(SDEdit) if one.name == "strength").share


@pytest.mark.parametrize(
    ("option", "value", "found"),
    [
        (Option("n", "whole", 4, ""), 3.0, 3),
        (Option("n", "whole", 4, ""), "3", 3),
        (Option("n", "whole", 4, ""), None, 4),
        (Option("n", "number", None, "", (), True), "", None),
        (Option("n", "number", 1.0, ""), "1e-3", 0.001),
        (Option("n", "flag", False, ""), True, True),
        (Option("n", "choice", "a", "", ("a", "b")), "b", "b"),
    ],
)
def test_values_of_the_page(option: Option, value: Any, found: Any) -> None:
    checked = option.checked(value)
    assert (checked, type(checked)) == (found, type(found))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        (Option("n", "whole", 4, ""), 3.5),
        (Option("n", "whole", 4, ""), True),
        (Option("n", "number", 4.0, ""), "inf"),
        (Option("n", "number", 4.0, ""), [1]),
        (Option("n", "flag", False, ""), "true"),
        (Option("n", "choice", "a", "", ("a", "b")), "c"),
        (Option("n", "choice", "a", "", ("a", "b")), ["a"]),
    ],
)
def test_values_of_another_kind(option: Option, value: Any) -> None:
    with pytest.raises(InputError, match="n: expected"):
        option.checked(value)
