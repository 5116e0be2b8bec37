"""From what the page says to the configuration of an edit, as `tokenflow predict` reads it."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from tokenflow.app.fitting import plugin_options, plugins
from tokenflow.app.options import UPLOADED, Option, options_of
from tokenflow.app.serving import Serving
from tokenflow.diffusion import Backbone, Traits
from tokenflow.engine.edit import check_prompt
from tokenflow.engine.further_channels import require_given
from tokenflow.engine.lightning.data import Video
from tokenflow.engine.lightning.job import PLUGINS, PROMPTS
from tokenflow.engine.lightning.manifest import FILES
from tokenflow.engine.lightning.metrics import Measuring
from tokenflow.engine.lightning.module import TokenFlowModule
from tokenflow.engine.lightning.run_writer import RunWriter
from tokenflow.engine.region import AUTO
from tokenflow.engine.settings import Settings
from tokenflow.errors import InputError
from tokenflow.storage.paths import local
from tokenflow.video import read_clip

UPLOADS = ".uploads"
"""The folder in that of the runs which the page's uploads lie in."""
LONGEST = 2000
"""Characters of a prompt."""
REACH = 100
"""How many times the most frames of an edit may lie before its first one: they are decoded."""
LARGER = 8
"""How many times the pixels of an edit's frame one of an upload may have, as it is scaled down."""
FRAMES = (
    Option("start", "whole", 0, "The first frame, from 0."),
    Option("max_frames", "whole", 16, "How many frames are edited."),
    Option("resolution", "whole", None, "Pixels of the shorter side; the source's.", (), True),
)
SETTINGS = {one.name: one for one in options_of(Settings)}


class Parser(ArgumentParser):
    """Raises `InputError` with what is wrong."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise InputError(message) from ex


class Requests:
    """Checks what pages ask for: they name only what the command line or a registry does.

    Args:
        serving: What the command line allows.
    """

    def __init__(self, serving: Serving) -> None:
        self.serving = serving
        self.folder = local(serving.folder).absolute()
        self.uploads = self.folder / UPLOADS
        self.described: dict[str, Traits] = {}
        self.parser = Parser(exit_on_error=False)
        for group, kind in (
            ("data", Video), ("model", TokenFlowModule), ("output", RunWriter),
            ("metrics", Measuring),
        ):  # fmt: skip
            self.parser.add_class_arguments(kind, group)

    def configuration(self, values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """What differs from the defaults, in the form of a YAML file for `predict --config`.

        Args:
            values: By name: `video`, `mask`, `depth`, `control` (files that were uploaded), the
                prompts, `auto` (to find a mask), `model`, `editor`, `propagation`, `measure`, those
                of `FRAMES`, of `Settings`, and of plugins, as `editor.PnP.features`.

        Raises:
            InputError: A value is none that the page could send, or beyond a limit.
        """
        serving, model = self.serving, dict[str, Any]()
        traits = self.traits(values.get("model"))
        own = dataclasses.asdict(traits.defaults) if traits.defaults else {}
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
        model["backbone"] = values["model"]
        for name in PLUGINS:
            model[name] = self.plugin(name, values, own)
        model |= chosen(SETTINGS, values, own=own)
        for name in ("steps", "inversion_steps"):
            if (model.get(name) or 0) > serving.max_steps:
                raise InputError(
                    f"{name}: expected at most {serving.max_steps}, got {model[name]}; "
                    f"--max_steps of tokenflow app allows more"
                )
        for name in ("dtype", "cache"):
            if getattr(serving, name) != getattr(Serving, name):
                model[name] = getattr(serving, name)
        if values.get("mask") and values.get("auto") is True:
            raise InputError(
                "expected one mask, got one that was given and the automatic one; remove the "
                "first, or untick the second"
            )
        if values.get("mask"):
            model["mask"] = str(self.uploaded(values, "mask"))
        elif values.get("auto") is True:
            model["mask"] = AUTO
        if values.get("depth"):
            if traits.further_channels != "depth":
                raise InputError(
                    f"depth: the model {values['model']} takes none; remove the depth, or choose a "
                    f"model that takes it"
                )
            model["depth"] = str(self.uploaded(values, "depth"))
        found = {"data": data, "model": model, "output": {"folder": str(self.folder)}}
        if values.get("measure") is True:
            found["metrics"] = {"measure": True}
        if serving.device != "auto":
            found["trainer"] = {"accelerator": serving.device}
        return found

    def traits(self, model: Any) -> Traits:
        """What a model is, by its files.

        Raises:
            InputError: The command line does not name it, or its files do not say.
        """
        if model not in self.serving.models:
            raise InputError(
                f"model: expected one of {', '.join(self.serving.models)}, got {model!r:.200}; "
                f"others are named by --models of tokenflow app"
            )
        if model not in self.described:
            self.described[model] = Backbone.describe(model)
        return self.described[model]

    def uploaded(self, values: Mapping[str, Any], name: str) -> Path:
        """The path of an uploaded file.

        Raises:
            InputError: None was, or it lies elsewhere, is too large, or is no video or picture.
        """
        value = values.get(name)
        if not value:
            raise InputError(f"there is no {name}; upload one")
        path, most = Path(str(value).replace("\0", "")).resolve(), self.serving.upload_megabytes
        if (
            "\0" in str(value)
            or not path.is_relative_to(self.uploads.resolve())
            or not path.is_file()
        ):
            raise InputError(f"{name}: expected a file that was uploaded, got {str(value)!r:.200}")
        if path.stat().st_size > most * 1_000_000:
            raise InputError(f"{name}: expected a file of at most {most} MB, got a larger one")
        height, width = read_clip(path, max_frames=1, in_memory=False).frames.shape[-2:]
        largest = LARGER * 2 * self.serving.max_resolution**2
        if height * width > largest:
            raise InputError(
                f"{name}: expected frames of at most {largest} pixels, got {width}x{height}; scale "
                f"it down first (--max_resolution of tokenflow app allows more)"
            )
        return path

    def check_frames(self, data: dict[str, Any]) -> None:
        """Raises `InputError` for more or larger frames than the command line allows."""
        serving = self.serving
        if not 1 <= data["max_frames"] <= serving.max_frames:
            raise InputError(
                f"frames: expected 1 to {serving.max_frames}, got {data['max_frames']}; "
                f"--max_frames of tokenflow app allows more"
            )
        self.check_start(data.get("start", 0))
        one = read_clip(data["video"], max_frames=1, in_memory=False)
        short, long = sorted(one.frames.shape[-2:])
        side, most = data.get("resolution", short), serving.max_resolution
        if side < 1:
            raise InputError(f"resolution: expected at least 1 pixel, got {side}")
        long = round(long * side / short)
        if side > most or side * long > 2 * most**2:
            raise InputError(
                f"the frames would have {side} pixels at their shorter side and {long} at their "
                f"longer one, expected at most {most} and {2 * most**2} in all; give a lower "
                f"resolution (--max_resolution of tokenflow app allows more)"
            )

    def check_start(self, start: int) -> None:
        """Raises `InputError` for a first frame before which too many would be decoded."""
        most = REACH * self.serving.max_frames
        if not 0 <= start <= most:
            raise InputError(
                f"start: expected 0 to {most}, got {start}; cut the clip out of the video"
            )

    def plugin(
        self, name: str, values: Mapping[str, Any], defaults: Mapping[str, Any]
    ) -> dict[str, Any]:
        """An editor or kernel with the options that differ from its, or the model's, defaults."""
        known, wanted = plugins(name), values.get(name)
        if not isinstance(wanted, str) or wanted not in known:
            expected = ", ".join(known)
            raise InputError(
                f"there is no {name} {wanted!r:.200} on this page; expected one of {expected}"
            )
        plugin = known[wanted]
        options = {one.name: one for one in plugin_options(plugin, self.serving.models)}
        own = {one: values.get(f"{name}.{wanted}.{one}") for one in options}
        given = chosen(options, own, own=defaults if plugin.ours else {})
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
            InputError: An option is out of its range, or something does not fit the model.
        """
        try:
            trainer = configuration.get("trainer", {})
            own = {group: one for group, one in configuration.items() if group != "trainer"}
            given = self.parser.parse_object(own)
            whole = yaml.safe_load(self.parser.dump(given, skip_unset=False))
            made = self.parser.instantiate(given)
            traits = self.traits(made.model.model)
            made.model.editor.check_model(traits)
            made.model.editor.check_steps(made.model.settings.steps)
            require_given(traits.further_channels, made.model.mask, made.model.depth)
            return whole | {"trainer": trainer}, made
        except InputError:
            raise
        except (ArgumentError, TypeError, ValueError, ImportError) as error:
            raise InputError(f"the edit cannot be made so: {error}") from error


def chosen(
    options: Mapping[str, Option],
    values: Mapping[str, Any],
    always: tuple[str, ...] = (),
    own: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """The values that differ from the options' defaults and from a model's own, checked."""
    checked = {name: one.checked(values.get(name)) for name, one in options.items()}
    defaults = {k: (one.default, own.get(k, one.default)) for k, one in options.items()}
    return {k: v for k, v in checked.items() if k in always or v not in defaults[k]}


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
