"""Editors and kernels that are chosen by name: checked, and made for a manifest's rows."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from tokenflow.cli.corrections import corrected
from tokenflow.cli.inputs import NAMED, paths_of
from tokenflow.cli.options import PLUGINS
from tokenflow.editors import Editor
from tokenflow.engine.lightning.job import Choice, Job, plugin_key
from tokenflow.engine.lightning.manifest import inside
from tokenflow.errors import InputError
from tokenflow.plugins import require_usable
from tokenflow.propagation import Propagation


class ChoiceParser(ArgumentParser):
    """Raises `InputError` with what is wrong."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise InputError(corrected(self, message)) from ex


class Choices:
    """Settles what jobs choose; what it may name, `allowlist.restrict` has limited before.

    Args:
        defaults: The run's own editor and kernel, with class_path and init_args.
    """

    def __init__(self, defaults: Mapping[str, Mapping[str, Any]]) -> None:
        self.defaults = defaults
        self.parsers = {name: ChoiceParser(exit_on_error=False) for name in PLUGINS}
        for name, kind in (("editor", Editor), ("propagation", Propagation)):
            self.parsers[name].add_argument(f"--{name}", type=kind, required=True)
        self.known: dict[str, tuple[dict[str, Any], str, Any]] = {}

    def settle(self, job: Job) -> None:
        """Completes a job's choices, and makes each once to see whether it can be made.

        Raises:
            InputError: A class is not installed or not allowed, or an option does not fit.
        """
        for name, choice in job.plugins.items():
            try:
                self.complete(name, choice)
            except InputError as error:
                raise InputError(f"{job.where}: {error}") from error

    def complete(self, name: str, choice: Choice) -> None:
        """Gives a choice all of its options, its description, and what makes it."""
        own, default = choice.spec, self.defaults[name]
        if "class_path" not in own:
            options = {**(default.get("init_args") or {}), **(own.get("init_args") or {})}
            own = {"class_path": default["class_path"], "init_args": options}
        text = yaml.safe_dump(own)
        if text not in self.known:
            require_usable(own["class_path"], PLUGINS[name])
            parser = self.parsers[name]
            try:
                spec = self.confined(name, self.parsed(name, own), choice.root)
                given = parser.parse_object({name: spec})
                plugin = getattr(parser.instantiate(given), name)
            except InputError:
                raise
            except (ArgumentError, TypeError, ValueError, ImportError) as error:
                raise InputError(f"the {name} cannot be made: {error}") from error
            self.known[text] = spec, plugin_key(plugin, spec), given
        spec, choice.described, given = self.known[text]
        choice.spec = spec

        def make() -> Any:
            return getattr(self.parsers[name].instantiate(given), name)

        choice.make = make  # type: ignore[method-assign]

    def parsed(self, name: str, spec: Mapping[str, Any]) -> dict[str, Any]:
        """A choice with all options, in the one form that jsonargparse has for its many spellings:
        dotted names, text that holds a mapping, dict_kwargs.
        """
        parser = self.parsers[name]
        given = parser.parse_object({name: deepcopy(spec)})  # which writes dotted names into it
        return dict(yaml.safe_load(parser.dump(given, skip_unset=False))[name])

    def confined(self, name: str, spec: dict[str, Any], root: Path) -> dict[str, Any]:
        """A parsed choice whose files, but for those that the run itself names, are in the root.

        Raises:
            ValueError: One lies outside of it, or there are options in which one could.
        """
        if has_dict_kwargs(spec):
            raise ValueError("expected no dict_kwargs; give a class its options under init_args")
        own = {options[option] for _, options, option in paths_of(name, self.defaults[name])}
        for _, options, option in list(paths_of(name, spec)):
            if option not in NAMED and options[option] not in own:
                options[option] = str(inside(root, options[option]))
        return spec


def has_dict_kwargs(spec: Any) -> bool:
    """Whether a class in a specification takes options that its signature does not list."""
    if isinstance(spec, dict):
        return "dict_kwargs" in spec or any(map(has_dict_kwargs, spec.values()))
    return isinstance(spec, list) and any(map(has_dict_kwargs, spec))
