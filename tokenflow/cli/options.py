"""The options of `tokenflow predict`, read from the sources of the classes that have them.

The help and the first checks need them before Lightning and torch are imported: that takes seconds.
"""

from __future__ import annotations

import ast
import json
import os
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import entry_points
from inspect import cleandoc
from pathlib import Path
from typing import Any, NamedTuple

from docstring_parser import DocstringStyle, parse

from tokenflow.cli.configurations import configs_first, split_allowed
from tokenflow.errors import InputError
from tokenflow.plugins import no_option
from tokenflow.storage.paths import FOLDER
from tokenflow.storage.safe_yaml import parse_yaml

PACKAGE = Path(__file__).parents[1]
CLASSES = {
    "data": (("engine/lightning/data.py", "Video"),),
    "model": (
        ("engine/lightning/module.py", "TokenFlowModule"),
        ("engine/settings.py", "Settings"),
    ),
    "output": (("engine/lightning/run_writer.py", "RunWriter"),),
    "metrics": (("engine/lightning/metrics.py", "Measuring"), ("metrics/measures.py", "Measures")),
}
"""The classes that a group's options are of, the second by way of the first's keywords."""
PLUGINS = {"editor": "tokenflow.editors", "propagation": "tokenflow.propagation"}
DEFAULTS = {"editor": "tokenflow.editors.PnP", "propagation": "tokenflow.propagation.NNField"}
"""By path, whatever else has the name."""
NAMED = {"FOLDER": FOLDER}
"""What stands in the sources for a default."""
PREFIX = "TOKENFLOW_PREDICT__"
"""Of the environment variables that hold options."""

DESCRIPTION = """\
Edits a video by text. Needed are --data.video and --model.prompt, or --data.manifest for many
videos.

A YAML file (--config) may hold any of the options, in groups as they are listed here: the command
line overrules it, whatever the order, and later files overrule earlier ones. --config pnp takes the
pnp.yaml that comes with tokenflow where there is no file of this name. Relative paths, those in a
YAML file too, count from the folder in which the command is typed; those in a manifest from the
manifest's, or --data.root. Options are also read from the environment, --model.prompt from
TOKENFLOW_PREDICT__MODEL__PROMPT.

A YAML file can name classes of tokenflow, of installed plugins and a few of Lightning's;
--allow_imports PACKAGE lets it name those of another package, and so run its code."""
GENERAL = {
    "-h, --help": "Shows this.",
    "-c, --config FILE": "A YAML file with options, or the name of an installed one; may be "
    "repeated.",
    "--print_config": "Prints the configuration that the other options come to.",
    "--allow_imports PACKAGE": "Lets a configuration name classes of this package, or only of "
    "mypackage.MyCallback; on the command line only, may be repeated.",
}
TRAINER = {
    "--trainer.accelerator NAME": '"cpu", "cuda" or another of Lightning\'s; "auto" takes an '
    "accelerator if there is one. (default: auto)",
    "--trainer.devices DEVICES": "How many share the work, or a list of which. (default: 1)",
    "--trainer.num_nodes NUMBER": "On how many machines. (default: 1)",
    "--trainer.strategy NAME": '"ddp" where several devices share the work. (default: auto)',
    "--trainer.logger LOGGER": "A logger's class name, as TensorBoardLogger, and its options as "
    "--trainer.logger.save_dir; false for none. (default: false)",
}


class Option(NamedTuple):
    """An argument of a class: its type and default as they are written, and what its docs say."""

    name: str
    kind: str
    default: Any
    about: str


def options_of(file: str, name: str) -> tuple[str, list[Option]]:
    """The first line of a class's docstring, and the options that its constructor takes.

    Args:
        file: Its module, relative to the package.
        name: The class, whose arguments are its fields if it has no constructor.
    """
    body = ast.parse((PACKAGE / file).read_text("utf-8")).body
    found = next(node for node in body if isinstance(node, ast.ClassDef) and node.name == name)
    docs = parse(cleandoc(ast.get_docstring(found) or ""), DocstringStyle.GOOGLE)
    about = {p.arg_name: " ".join((p.description or "").split()) for p in docs.params}
    written = list(constructor(found)) or [
        (node.target.id, node.annotation, node.value)
        for node in found.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    ]
    options = [
        Option(arg, ast.unparse(kind) if kind else "", valued(default), about[arg])
        for arg, kind, default in written
        if arg in about
    ]
    return docs.short_description or "", options


def constructor(of: ast.ClassDef) -> Iterator[tuple[str, ast.expr | None, ast.expr | None]]:
    """Name, type and default of each argument of a class's `__init__`."""
    for node in of.body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            arguments = node.args.args[1:]
            needed: list[ast.expr | None] = [None] * (len(arguments) - len(node.args.defaults))
            defaults = [*needed, *node.args.defaults]
            for argument, default in zip(arguments, defaults, strict=True):
                yield argument.arg, argument.annotation, default


def valued(default: ast.expr | None) -> Any:
    """What a default is; None where there is none."""
    if isinstance(default, ast.Name):
        return NAMED[default.id]
    return None if default is None else ast.literal_eval(default)


def group_options(group: str) -> dict[str, Option]:
    """All options of a group, by name."""
    found = [option for place in CLASSES[group] for option in options_of(*place)[1]]
    return {option.name: option for option in found}


def print_help() -> None:
    """Prints what `tokenflow predict --help` shows."""
    parser = ArgumentParser(
        usage="tokenflow predict [OPTIONS]",
        description=DESCRIPTION,
        formatter_class=partial(
            RawDescriptionHelpFormatter, indent_increment=2, max_help_position=24, width=100
        ),
        add_help=False,
    )

    def add(title: str, rows: Mapping[str, str]) -> None:
        group = parser.add_argument_group(title)
        for words, about in rows.items():
            *flags, metavar = words.replace(",", "").split()
            if metavar.startswith("-"):
                group.add_argument(*flags, metavar, action="store_true", help=escaped(about))
            else:
                group.add_argument(*flags, metavar=metavar, help=escaped(about))

    add("general", GENERAL)
    for name, places in CLASSES.items():
        title = f"--{name}: {options_of(*places[0])[0].rstrip('.')}"
        rows = {}
        for option in group_options(name).values():
            rows[f"--{name}.{option.name} {option.name.upper()}"] = described(option)
        add(title, rows)
    add("--trainer: Lightning's Trainer, of which all options are accepted, such as", TRAINER)
    parser.print_help()


def escaped(text: str) -> str:
    """A text in which argparse fills in nothing."""
    return text.replace("%", "%%")


def described(option: Option) -> str:
    """The help of an option."""
    if option.name in PLUGINS:
        names = sorted({entry.name for entry in entry_points(group=PLUGINS[option.name])})
        named = DEFAULTS[option.name].rsplit(".", 1)[-1]
        return (
            f"{option.about} Installed are {', '.join(names)}; --model.{option.name}.help NAME "
            f"lists the options of one. (default: {named})"
        )
    plain = set(option.kind.replace("|", " ").split()) <= {"str", "int", "float", "bool", "None"}
    kind = f"{option.kind.replace('None', 'null')}, " if plain else ""
    default = option.default if option.default and type(option.default) is str else None
    return f"{option.about} ({kind}default: {default or json.dumps(option.default)})"


def check(words: Sequence[str]) -> None:
    """Checks a command line as far as possible before anything heavy is imported.

    Args:
        words: After `tokenflow predict`.

    Raises:
        InputError: An option does not exist, or none names a clip, or none gives the prompt.
    """
    words = configs_first(split_allowed(words)[0])
    if any(word.startswith("--print_config") or word.endswith(".help") for word in words):
        return
    names = {word[2:].partition("=")[0].rstrip("+") for word in words if word.startswith("--")}
    given: set[str] = set()
    for name in names:
        group, _, option = name.partition(".")
        if group in CLASSES and option:
            given |= {f"{group}.{name}" for name in meant(group, option.split(".")[0])}
    given |= in_environment() | in_files(words)
    if "?" in given:  # in a file that only the parser understands
        return
    if not given & {"data.video", "data.manifest"}:
        raise InputError("expected --data.video, or --data.manifest for many, got neither")
    if not given & {"data.manifest", "model.prompt"}:
        raise InputError("the prompt is empty; say what the edited video shows, by --model.prompt")


def meant(group: str, option: str) -> list[str]:
    """The options of a group that a word begins, as argparse abbreviates them.

    Raises:
        InputError: There is none.
    """
    known = list(group_options(group))
    if found := [name for name in known if name.startswith(option)]:
        return found
    kind = CLASSES[group][0][1]
    raise InputError(no_option(option, kind, known))


def options_in(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each option among words, with its value; one that another option follows has none."""
    left = list(words)
    while left:
        name, equals, value = left.pop(0).partition("=")
        if name.startswith("--"):
            follows = left and not left[0].startswith("--")
            yield name, value if equals else left.pop(0) if follows else ""


def in_environment() -> set[str]:
    """The options that environment variables give; "?" where one names a configuration."""
    if "TOKENFLOW_CONFIG" in os.environ:
        return {"?"}
    found = {name.removeprefix(PREFIX) for name in os.environ if name.startswith(PREFIX)}
    groups = {"CONFIG", *map(str.upper, CLASSES)}
    return {"?" if name in groups else name.lower().replace("__", ".") for name in found}


def in_files(words: Sequence[str]) -> set[str]:
    """The options that configuration files give; "?" where one cannot be read here."""
    found: set[str] = set()
    for name, value in files(words):
        try:
            given = parse_yaml(Path(value).read_text(), value)
        except (OSError, UnicodeDecodeError, InputError):
            return {"?"}
        groups = given if name == "config" else {name: given}
        if not isinstance(groups, dict):
            return {"?"}
        for group, options in groups.items():
            if group in CLASSES:
                listed = isinstance(options, dict)
                found |= {f"{group}.{key}" for key in options} if listed else {"?"}
    return found


def files(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The files that words name, of a whole configuration or of a group's options."""
    for name, value in options_in(words):
        if name.removeprefix("--") in ("config", *CLASSES):
            yield name.removeprefix("--"), value
