"""A check, its message on failure, and the checks that editors and kernels share."""

from __future__ import annotations

import copy
import inspect
import pickle
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import numpy as np
import torch
from jsonargparse import ArgumentParser

from tokenflow.errors import Interrupted, Preempted
from tokenflow.plugins import GROUPS, base_of, stated_interface
from tokenflow.testing.state import global_state, restored
from tokenflow.violations import Violation

T = TypeVar("T")
SEED = 3_141_592_653


class ConformanceError(AssertionError):
    """A plugin breaks its contract: which check, what was expected, what came, what to do."""

    def __init__(self, check: str, expected: str, got: object, advice: str) -> None:
        super().__init__(f"{check}: expected {expected}, got {got}; {advice}")
        self.check, self.expected, self.got, self.advice = check, expected, got, advice


class FailedError(Exception):
    """What a check's function raises; `Check` adds the name."""


def require(condition: bool | torch.Tensor, expected: str, got: object, advice: str) -> None:
    """Raises `FailedError` unless the condition holds."""
    if not condition:
        raise FailedError(expected, got, advice)


def require_kept(violations: Iterable[Violation], *rules: str) -> None:
    """Raises `FailedError` with the first of the violations that is of one of these rules."""
    for rule, *rest in violations:
        if rule in rules:
            raise FailedError(*rest)


@dataclass(frozen=True)
class Check:
    """One check of one plugin; calling it runs it, on a copy and in a state of its own.

    Raises:
        ConformanceError: The plugin fails it, or raises an exception in it.
    """

    plugin: Any
    function: Callable[..., None]
    arguments: tuple[Any, ...] = ()

    @property
    def __name__(self) -> str:  # pytest takes it as the test's id
        return self.function.__name__

    def __call__(self) -> None:
        try:
            with torch.random.fork_rng(), torch.no_grad(), restored():
                self.function(copy.deepcopy(self.plugin), *self.arguments)
        except FailedError as failed:
            raise ConformanceError(self.__name__, *failed.args) from None
        except (Interrupted, Preempted):
            raise
        except (Exception, SystemExit) as error:  # a third party's code may raise anything
            raise ConformanceError(
                self.__name__, "no exception", f"{type(error).__name__}: {error}",
                "the exception above says where it was raised",
            ) from error  # fmt: skip


@contextmanager
def unchanged_state() -> Iterator[None]:
    """Requires a block to leave the process's own state as it was."""
    # of a seed that nobody takes: a plugin that seeds with the current seed would not be noticed
    torch.manual_seed(SEED)
    np.random.seed(SEED)
    before = global_state()
    yield
    changed = [name for name, value in global_state().items() if value != before[name]]
    require(
        not changed, "all of the process's own state left as it was",
        f"another {' and '.join(changed)}", "draw with a generator, and set nothing globally",
    )  # fmt: skip


def run_all(checks: Sequence[Check]) -> None:
    """Runs checks in turn; the first failure is raised."""
    for check in checks:
        check()


def interface_stated(plugin: Any) -> None:
    """The class itself states the interface for which it was written, and that is this one."""
    (base,) = (base for base in map(base_of, GROUPS) if isinstance(plugin, base))
    stated = stated_interface(type(plugin))
    require(
        stated == base.interface, f"a class that states interface = {base.interface}", stated,
        "write in the class for which interface it was made, or it is listed as unusable",
    )  # fmt: skip


def configuration_round_trip(plugin: Any) -> None:
    """Dumped to YAML, as `init_args` of predict's configuration, and loaded again: the same.

    Arguments of plain type that the plugin keeps under their own names are taken with the values
    that it has, the others with their defaults.
    """
    kind, values = type(plugin), {}
    for name, hint in get_type_hints(kind.__init__).items():
        require(
            not takes_anything(hint), "options of types that YAML can hold", f"{name}: {hint}",
            "a configuration could call functions by an option of type Callable or Any: take "
            "numbers, text, lists, and classes of such",
        )  # fmt: skip
    for name, option in inspect.signature(kind).parameters.items():
        require(
            option.annotation is not option.empty
            and option.kind not in (option.VAR_POSITIONAL, option.VAR_KEYWORD),
            "constructor arguments that are named and typed", f"{option}",
            "give it a name and a type: the command line's options are made from them",
        )  # fmt: skip
        if plain(value := getattr(plugin, name, object())):
            values[name] = value
        require(
            name in values or option.default is not option.empty,
            "a default, or the argument kept under its name", f"neither for {name}",
            f"give it a default, or set self.{name}, so that the kit can make another",
        )  # fmt: skip
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind)
    first = parser.parse_object(values)
    again = parser.parse_string(parser.dump(first))
    require(
        again == first, f"the arguments {first}", again,
        "use argument types that YAML can hold: numbers, text, lists, and classes of such",
    )  # fmt: skip
    kind(**parser.instantiate(again).as_dict())


@contextmanager
def anew(plugin: T) -> Iterator[T]:
    """Gives a copy that knows nothing of earlier calls: its class's module is run once more.

    Where that cannot be, as for a class that is made in a function or a script, the copy is of the
    plugin's own class, and what that keeps goes unnoticed.
    """
    made, name = copy.deepcopy(plugin), type(plugin).__module__
    own = sys.modules.get(name)
    if own is None or name == "__main__":  # a script would run in itself
        yield made
        return
    try:
        kept = pickle.dumps(plugin)  # finds classes by name, and then those of the module's copy
        places = getattr(own, "__path__", None)
        spec: Any = spec_from_file_location(name, own.__file__, submodule_search_locations=places)
        sys.modules[name] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
        made = pickle.loads(kept)
    except Exception:  # a third party's module may do anything
        sys.modules[name] = own
    try:
        yield made
    finally:
        sys.modules[name] = own


def takes_anything(hint: Any) -> bool:
    """Whether a type, or one that it is made of, lets any function or object in."""
    if hint in (Any, object) or Callable in (hint, get_origin(hint)):
        return True
    return any(map(takes_anything, get_args(hint)))


def plain(value: object) -> bool:
    """Whether YAML holds a value as it is."""
    if isinstance(value, (list, tuple)):
        return all(map(plain, value))
    return value is None or isinstance(value, (str, int, float, bool))
