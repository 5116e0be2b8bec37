"""What a run is made of: clips to edit, each with what is special about it."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tokenflow.editors import Editor
from tokenflow.engine.checked import blamed
from tokenflow.engine.region import AUTO, Automatic
from tokenflow.errors import InputError
from tokenflow.plugins import code_of, origin
from tokenflow.propagation import Propagation
from tokenflow.storage.digests import of_path
from tokenflow.video import Clip, clip_name, read_clip

CHOICE = ("start", "stop", "stride", "max_frames", "resolution", "fit", "image_rate")
LONGEST = 255
"""Bytes that a folder's name may have."""
UNPRINTABLE = ("Cc", "Cs", "Zl", "Zp")
"""Unicode's categories of control characters, lone surrogates, and ends of lines."""
PROMPTS = ("prompt", "negative_prompt", "inversion_prompt")
PLUGINS = ("editor", "propagation")


class ClipSource:
    """Where a clip comes from, and which frames of it; they are read only when needed."""

    def __init__(self, path: Path, **choice: Any) -> None:
        self.path, self.choice = path, choice

    @property
    def name(self) -> str:
        """The clip's name."""
        return clip_name(self.path)

    @property
    def record(self) -> dict[str, Any]:
        """What `of_record` makes the same source from, as YAML holds it; its path is absolute."""
        return {"video": str(self.path.absolute()), **self.choice}

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> ClipSource:
        """The source that a run's record names.

        Raises:
            TypeError: The record holds something else.
        """
        choice = dict(record)
        path = choice.pop("video", None)
        if not isinstance(path, str) or set(choice) - set(CHOICE):
            raise TypeError(f"no source: {dict(record)}")
        return cls(Path(path), **choice)

    def read(self, multiple: int, deep: bool = False) -> Clip:
        """The clip, whose frames are decoded when they are needed; `deep` as of `read_clip`.

        The sides are multiples of `multiple` pixels.
        """
        return read_clip(self.path, multiple=multiple, in_memory=False, deep=deep, **self.choice)


def plugin_key(plugin: Editor | Propagation, spec: Mapping[str, Any]) -> str:
    """Of an editor or kernel its package, version, code and options, and a kernel's digest of
    files: the key of what runs keep.

    `spec` is as a configuration has it. An editor's digest is asked for when its clip is known.
    """
    kind = type(plugin)
    options = {k: v for k, v in spec.items() if k != "class_path" and v}  # which has many spellings
    name = f"{kind.__module__}.{kind.__qualname__}"
    key = f"{origin(kind)}\n{name}\n{code_of(kind)}\n{yaml.safe_dump(options)}"
    if isinstance(plugin, Propagation):
        with blamed(plugin, "cache_key"):
            key += plugin.cache_key()
    return key


class Choice:
    """An editor or kernel that a manifest's row chooses, made when the clip's turn comes.

    Attributes:
        spec: As a configuration has it: `class_path` and `init_args`. Where it has no class, the
            options are those of the run's own editor or kernel.
        root: The folder that its files must lie in, and are relative to.
        described: Class, package and options as one text, by which samplings are kept.
    """

    def __init__(self, spec: Mapping[str, Any], root: Path) -> None:
        self.spec, self.root, self.described = dict(spec), root, ""

    def make(self) -> Any:
        """A new plugin.

        Raises:
            InputError: Nobody has settled how: classes are named to the command line.
        """
        raise InputError(f"only tokenflow predict makes what a manifest names, got {self.spec}")


class Job:
    """One clip to edit: what a batch is. No dataclass, as Lightning would take that apart.

    Args:
        source: The clip.
        name: Of the folder that its files go to; the clip's if not given.
        prompts: Those that are its own: `prompt`, `negative_prompt`, `inversion_prompt`.
        settings: Its own `Settings`.
        where: Its place in a manifest; None for a run of one clip.
        plugins: Its own `editor` and `propagation`.
        mask: A video or folder of images, white where the object is that is to be edited.
        edit_mask: That of its own local edit, "auto" for one that is found.
        depth: Its own depth, for models that are given it.

    Raises:
        InputError: The name is none of a folder.
    """

    def __init__(
        self,
        source: ClipSource,
        name: str | None = None,
        prompts: Mapping[str, str] | None = None,
        settings: Mapping[str, Any] | None = None,
        where: str | None = None,
        plugins: Mapping[str, Choice] | None = None,
        mask: Path | None = None,
        edit_mask: Path | Automatic | None = None,
        depth: Path | None = None,
    ) -> None:
        self.source, self.name = source, source.name if name is None else name
        if Path(self.name).name != self.name or self.name in ("", ".", ".."):
            place = f"{where}: " if where else ""
            raise InputError(
                f"{place}expected the name of a folder for {source.path}, got {self.name!r}; "
                f"rename the video, or give its row of a manifest another name"
            )
        if where is not None and (reason := unfit(self.name)):
            raise InputError(
                f"{where}: the name {self.name!r:.80} {reason}; give the row another name"
            )
        self.prompts, self.settings = dict(prompts or {}), dict(settings or {})
        self.where, self.mask, self.edit_mask, self.depth = where, mask, edit_mask, depth
        self.plugins: dict[str, Choice] = dict(plugins or {})
        self.inputs: dict[str, Path] = {"data.video": source.path}
        """The files and folders that the edit reads, by the option that names them."""

    def configured(self, run: Mapping[str, Any]) -> dict[str, Any]:
        """The run's configuration with what is the job's own: it edits this clip alone."""
        if self.where is None:
            return dict(run)
        paths = {"mask": self.edit_mask, "depth": self.depth}
        own = {name: str(path) for name, path in paths.items() if path is not None}
        plugins = {name: choice.spec for name, choice in self.plugins.items()}
        alone = {"video": str(self.source.path.absolute()), "manifest": None, "root": None}
        return {
            **run,
            "data": {**run["data"], **self.source.choice, **alone, "part": "1/1"},
            "model": {**run["model"], **self.prompts, **self.settings, **plugins, **own},
        }

    def record(self) -> dict[str, Any]:
        """What a run's record holds of the job: its inputs' digests, and what it chose itself.

        Raises:
            InputError: An input cannot be read.
        """
        try:
            inputs = {
                option: {"path": str(path.absolute()), "sha256": of_path(path)}
                for option, path in self.inputs.items()
            }
        except OSError as error:
            raise InputError(f"an input of {self.name} cannot be read: {error}") from error
        own: dict[str, Any] = {name: choice.spec for name, choice in self.plugins.items()}
        for name, path in (("mask", self.edit_mask), ("depth", self.depth)):
            own |= {} if path is None else {name: path if path == AUTO else str(path.absolute())}
        mask = {"mask": str(self.mask.absolute())} if self.mask is not None else {}
        return {"inputs": inputs, **mask, **({"model": own} if own else {})}


def unfit(name: str) -> str:
    """Why a listed name is none for a folder and for the lines of a terminal, or nothing."""
    if not name.isprintable() and any(unicodedata.category(sign) in UNPRINTABLE for sign in name):
        return "has characters that control a terminal or belong to no text"
    size = len(name.encode(errors="replace"))
    return f"has {size} bytes, expected at most {LONGEST}" if size > LONGEST else ""


class Outcome:
    """The status of a job, "done", "skipped" or "failed", and the reason."""

    def __init__(self, job: Job, status: str, reason: str = "", seconds: float = 0.0) -> None:
        self.name, self.status, self.reason, self.seconds = job.name, status, reason, seconds
        self.many = job.where is not None
