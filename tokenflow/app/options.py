"""The options of a class that the page offers, by its typed constructor and its docstring.

Text that would be free could name a file, a model or a class of the server's: a text is offered
only where the docstring quotes what it may be, and a class only where it can be made without files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from inspect import Parameter, isabstract, signature
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from docstring_parser import DocstringStyle, parse

from tokenflow.engine.lightning.manifest import FILES
from tokenflow.errors import InputError

KINDS = {bool: "flag", int: "whole", float: "number"}
SHARE = re.compile(r"(?<![\d.-])(0 to|above 0 and up to) 1(?!\.?\d)")
"""How a docstring states the range of a share; "0 to 10" and "10 to 1" are others."""
UPLOADED = "ControlVideo"
"""The class of a file that the page uploads for it."""


@dataclass(frozen=True)
class Option:
    """One argument of a constructor: "flag", "whole", "number", "choice", or "class" of choices.

    Where it is `optional`, None is the default of the class or the model.
    """

    name: str
    kind: str
    default: Any
    about: str
    choices: tuple[str, ...] = ()
    optional: bool = False

    @property
    def share(self) -> bool:
        """Whether it is a number from 0 to 1, as its docstring says."""
        return self.kind == "number" and SHARE.search(self.about) is not None

    def checked(self, value: Any) -> Any:
        """A value that came from the page, as the constructor takes it.

        Raises:
            InputError: It is of another kind, or none of the choices.
        """
        if value is None or value == "":
            return None if self.optional else self.default
        if self.kind in ("choice", "class"):
            if value in self.choices:
                return value
            expected = f"one of {', '.join(self.choices)}"
        elif self.kind == "flag":
            if isinstance(value, bool):
                return value
            expected = "true or false"
        else:
            number = as_number(value)
            if math.isfinite(number) and (self.kind == "number" or number == int(number)):
                return number if self.kind == "number" else int(number)
            expected = "a whole number" if self.kind == "whole" else "a finite number"
        raise InputError(f"{self.name}: expected {expected}, got {value!r:.100}")


def as_number(value: Any) -> float:
    """A number, or the text of one; NaN for anything else."""
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def options_of(kind: type[Any]) -> list[Option]:
    """The options of a class that the page can offer safely, in the order of its constructor."""
    hints = get_type_hints(kind.__init__)
    docs = parse(kind.__doc__ or "", DocstringStyle.GOOGLE).params
    about = {one.arg_name: " ".join((one.description or "").split()) for one in docs}
    found = (
        option(name, hints.get(name), argument, about.get(name, ""))
        for name, argument in signature(kind).parameters.items()
    )
    return [one for one in found if one is not None]


def option(name: str, hint: Any, argument: Parameter, about: str) -> Option | None:
    """One argument as an option; None for what the page cannot offer."""
    if argument.default is Parameter.empty or argument.kind is Parameter.VAR_KEYWORD:
        return None
    union = get_origin(hint) in (Union, UnionType)
    parts = [part for part in (get_args(hint) if union else (hint,)) if part is not NoneType]
    optional = len(parts) < len(get_args(hint)) if union else False
    words = tuple(w for part in parts if get_origin(part) is Literal for w in get_args(part))
    if not words and parts == [str]:
        quoted = tuple(dict.fromkeys(re.findall(r'"([\w.-]+)"', about)))
        words = quoted if argument.default in quoted else ()
    kind, default = "choice", argument.default
    if not words and len(parts) == 1:
        if parts[0] in KINDS:
            kind = KINDS[parts[0]]
        elif default is None and getattr(parts[0], "__module__", "").startswith("tokenflow."):
            kind, words = "class", tuple(one.__name__ for one in makeable(parts[0]))
    if kind in ("choice", "class") and not words:
        return None
    return Option(name, kind, default, about, words, optional)


def makeable(base: type[Any]) -> Iterator[type[Any]]:
    """The subclasses that need no argument, or only a file that the page uploads."""
    for kind in base.__subclasses__():
        yield from makeable(kind)
        uploaded = {FILES[UPLOADED]} if kind.__name__ == UPLOADED else set()
        ours = kind.__module__.startswith("tokenflow.") and not isabstract(kind)
        if ours and needed_by(kind) == uploaded:
            yield kind


def needed_by(kind: type[Any]) -> set[str]:
    """The arguments of a constructor that have no default."""
    given = (Parameter.VAR_KEYWORD, Parameter.VAR_POSITIONAL)
    arguments = signature(kind).parameters.items()
    return {k for k, a in arguments if a.default is Parameter.empty and a.kind not in given}
