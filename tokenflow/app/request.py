"""From what the page says to the configuration of an edit, as `tokenflow predict` reads it."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from tokenflow.app.options import UPLOADED, Option, needed_by, options_of
from tokenflow.app.serving import Serving
from tokenflow.engine.edit import check_prompt
from tokenflow.engine.lightning.data import Video
from tokenflow.engine.lightning.job import PLUGINS, PROMPTS
from tokenflow.engine.lightning.manifest import FILES
from tokenflow.engine.lightning.metrics import Measuring
from tokenflow.engine.lightning.module import TokenFlowModule
from tokenflow.engine.lightning.run_writer import RunWriter
from tokenflow.engine.settings import Settings
from tokenflow.errors import InputError
from tokenflow.plugins import GROUPS, Plugin, installed_plugins
from tokenflow.storage.paths import local
from tokenflow.video import read_clip

UPLOADS = ".uploads"
"""The folder in that of the runs which the page's uploads lie in."""
LONGEST = 2000
"""Characters of a prompt."""
FRAMES = (
    Option("start", "whole", 0, "The first frame, from 0."),
    Option("max_frames", "whole", 16, "How many frames are edited."),
    Option("resolution", "whole", None, "Pixels of the shorter side; the source's.", (), True),
)
GROUP_OF = dict(zip(PLUGINS, GROUPS, strict=True))
SETTINGS = {one.name: one for one in options_of(Settings)}


class Parser(ArgumentParser):
    """Raises `InputError` with what is wrong."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise InputError(message) from ex


def plugins(name: str) -> dict[str, Plugin]:
    """The editors, or kernels ("propagation"), by their names, that need no argument."""
    return {
        one.name: one
        for one in installed_plugins()
        if one.group == GROUP_OF[name] and one.kind is not None and not needed_by(one.kind)
    }


class Requests:
    """Checks what pages ask for: they name only what the command line or a registry does.

    Args:
        serving: What the command line allows.
    """

    def __init__(self, serving: Serving) -> None:
        self.serving = serving
        self.folder = local(serving.folder).absolute()
        self.uploads = self.folder / UPLOADS
        self.parser = Parser(exit_on_error=False)
        for group, kind in (
            ("data", Video), ("model", TokenFlowModule), ("output", RunWriter),
            ("metrics", Measuring),
        ):  # fmt: skip
            self.parser.add_class_arguments(kind, group)

    def configuration(self, values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """What differs from the defaults, in the form of a YAML file for `predict --config`.

        Args:
            values: By name: `video`, `mask`, `control` (files that were uploaded), the prompts,
                `model`, `editor`, `propagation`, `measure`, those of `FRAMES`, those of `Settings`,
                and those of plugins as `editor.PnP.features`.

        Raises:
            InputError: A value is none that the page could send, or beyond a limit.
        """
        serving, model = self.serving, dict[str, Any]()
        data = {"video": str(self.uploaded(values, "video"))}
        data |= chosen({one.name: one for one in FRAMES}, values, always=("max_frames",))
        self.check_frames(data)
        for name in PROMPTS:
            text = str(values.get(name) or "").strip()
            if len(text) > LONGEST:
                raise InputError(f"{name}: expected at most {LONGEST} characters, got {len(text)}")
            if text:
                model[name] = text
        check_prompt(model.get("prompt", ""))
        model["backbone"] = values.get("model")
        if model["backbone"] not in serving.models:
            raise InputError(
                f"model: expected one of {', '.join(serving.models)}, got "
                f"{values.get('model')!r:.200}; others are named by --models of tokenflow app"
            )
        for name in PLUGINS:
            model[name] = self.plugin(name, values)
        model |= chosen(SETTINGS, values)
        for name in ("steps", "inversion_steps"):
            if (model.get(name) or 0) > serving.max_steps:
                raise InputError(
                    f"{name}: expected at most {serving.max_steps}, got {model[name]}; "
                    f"--max_steps of tokenflow app allows more"
                )
        for name in ("dtype", "cache"):
            if getattr(serving, name) != getattr(Serving, name):
                model[name] = getattr(serving, name)
        if values.get("mask"):
            model["mask"] = str(self.uploaded(values, "mask"))
        found = {"data": data, "model": model, "output": {"folder": str(self.folder)}}
        if values.get("measure") is True:
            found["metrics"] = {"measure": True}
        if serving.device != "auto":
            found["trainer"] = {"accelerator": serving.device}
        return found

    def uploaded(self, values: Mapping[str, Any], name: str) -> Path:
        """The path of an uploaded file.

        Raises:
            InputError: None was, or it lies elsewhere, or is too large.
        """
        value = values.get(name)
        if not value:
            raise InputError(f"there is no {name}; upload one")
        path, most = Path(str(value)).resolve(), self.serving.upload_megabytes
        if not path.is_relative_to(self.uploads.resolve()) or not path.is_file():
            raise InputError(f"{name}: expected a file that was uploaded, got {str(value)!r:.200}")
        if path.stat().st_size > most * 1_000_000:
            raise InputError(f"{name}: expected a file of at most {most} MB, got a larger one")
        return path

    def check_frames(self, data: dict[str, Any]) -> None:
        """Raises `InputError` for more or larger frames than the command line allows."""
        serving = self.serving
        if not 1 <= data["max_frames"] <= serving.max_frames:
            raise InputError(
                f"frames: expected 1 to {serving.max_frames}, got {data['max_frames']}; "
                f"--max_frames of tokenflow app allows more"
            )
        one = read_clip(data["video"], max_frames=1, in_memory=False)
        side = data.get("resolution") or min(one.frames.shape[-2:])
        if side > serving.max_resolution:
            raise InputError(
                f"the frames would have {side} pixels at their shorter side, expected at most "
                f"{serving.max_resolution}; give a lower resolution (--max_resolution of tokenflow "
                f"app allows more)"
            )

    def plugin(self, name: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """An editor or kernel with the options that differ from its defaults."""
        known, wanted = plugins(name), values.get(name)
        if not isinstance(wanted, str) or wanted not in known:
            expected = ", ".join(known)
            raise InputError(
                f"there is no {name} {wanted!r:.200} on this page; expected one of {expected}"
            )
        plugin = known[wanted]
        options = {one.name: one for one in plugin_options(plugin, self.serving.models)}
        own = {one: values.get(f"{name}.{wanted}.{one}") for one in options}
        given = chosen(options, own)
        for option, value in given.items():
            if options[option].kind == "whole" and value > self.serving.max_steps:
                raise InputError(
                    f"{option}: expected at most {self.serving.max_steps}, got {value}; "
                    f"--max_steps of tokenflow app allows more"
                )
            if options[option].kind == "class":
                given[option] = {"class_path": value}
                if value == UPLOADED:
                    path = str(self.uploaded(values, "control"))
                    given[option]["init_args"] = {FILES[UPLOADED]: path}
        spec: dict[str, Any] = {"class_path": plugin.name if plugin.ours else plugin.path}
        return spec | ({"init_args": given} if given else {})

    def complete(self, configuration: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
        """The configuration with every default, and what it makes: data, model, output, metrics.

        Raises:
            InputError: An option is out of its range.
        """
        try:
            trainer = configuration.get("trainer", {})
            own = {group: one for group, one in configuration.items() if group != "trainer"}
            given = self.parser.parse_object(own)
            whole = yaml.safe_load(self.parser.dump(given, skip_unset=False))
            return whole | {"trainer": trainer}, self.parser.instantiate(given)
        except InputError:
            raise
        except (ArgumentError, TypeError, ValueError, ImportError) as error:
            raise InputError(f"the edit cannot be made so: {error}") from error


def plugin_options(plugin: Plugin, models: Any = ()) -> list[Option]:
    """A plugin's options; one that names a model may also name those of the command line."""
    return [
        dataclasses.replace(one, choices=tuple(dict.fromkeys((*one.choices, *models))))
        if one.name == "model" and one.kind == "choice"
        else one
        for one in options_of(plugin.kind)  # type: ignore[arg-type]
    ]


def chosen(
    options: Mapping[str, Option], values: Mapping[str, Any], always: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The values that differ from the options' defaults, checked."""
    checked = {name: one.checked(values.get(name)) for name, one in options.items()}
    return {k: v for k, v in checked.items() if k in always or v != options[k].default}


def again(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration for another folder of runs: a finished run is not replaced."""
    folder = Path((configuration.get("output") or {}).get("folder") or "runs")
    return {**configuration, "output": {"folder": str(folder.with_name(f"{folder.name}-again"))}}


def yaml_of(configuration: Mapping[str, Any]) -> str:
    """The YAML that `tokenflow predict --config` reads, for another folder of runs."""
    return yaml.safe_dump(again(configuration), sort_keys=False, allow_unicode=True)


def command_of(configuration: Mapping[str, Any]) -> str:
    """The command line that makes the same edit, in another folder of runs."""
    words = ["tokenflow", "predict"]
    for name, value in flat(again(configuration)):
        words += [f"--{name}={value}"] if value.startswith("-") else [f"--{name}", value]
    return shlex.join(words)


def flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """Options by their dotted names, as a command line gives them."""
    for key, value in values.items():
        name = before if key in ("class_path", "init_args") else f"{before}.{key}".strip(".")
        if isinstance(value, Mapping):
            yield from flat(value, name)
        else:
            word = value is None or isinstance(value, bool)
            yield name, json.dumps(value) if word else str(value)
