"""The files that a run reads: in the record as absolute paths, and opened before the first pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tokenflow.diffusion.backbone import EMBEDDED
from tokenflow.engine.lightning.job import Job
from tokenflow.engine.lightning.manifest import FILES
from tokenflow.engine.region import AUTO
from tokenflow.storage.paths import local
from tokenflow.video import VideoError, read_clip

PATHS = {
    "data": ("video", "manifest", "root"),
    "model": ("backbone", "vae", "cache", "mask", "depth"),
    "output": ("folder",),
    "metrics": ("mask", "clip", "lpips"),
}
"""The options of a configuration that are paths, besides those of classes."""
NAMED = ("backbone", "vae", "model", "image_encoder")
"""Options that are a path only where there is such a one, else the name of a model."""
CLASSES = {"model": ("editor", "propagation", "loras", "embeddings"), "metrics": ("flow",)}


def make_absolute(configuration: dict[str, Any]) -> dict[str, str]:
    """Makes the paths in a configuration absolute; returns what was typed where that differs.

    A path that begins with ~ stays as it is, and so does an automatic mask.
    """
    typed: dict[str, str] = {}
    for where, options, name in list(paths_in(configuration)):
        path = options[name]
        folder = local(path)
        if (where, path) == ("model.mask", AUTO) or path.startswith("~"):
            continue
        if name in NAMED and (path in EMBEDDED or not folder.exists()):
            continue
        if (whole := str(folder.absolute())) != path:
            typed[where], options[name] = path, whole
    return typed


def paths_in(configuration: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], str]]:
    """The options that are paths: the whole name, the mapping that holds it, its name in that."""
    for group, names in PATHS.items():
        options = configuration.get(group) or {}
        for name in names:
            if isinstance(options.get(name), str) and options[name]:
                yield f"{group}.{name}", options, name
    for group, names in CLASSES.items():
        for name in names:
            yield from paths_of(f"{group}.{name}", (configuration.get(group) or {}).get(name))


def paths_of(where: str, spec: Any) -> Iterator[tuple[str, dict[str, Any], str]]:
    """The same of a class with options, and of those in its options."""
    if isinstance(spec, list):
        for number, one in enumerate(spec):
            yield from paths_of(f"{where}.{number}", one)
    if not isinstance(spec, dict):
        return
    option = FILES.get(str(spec.get("class_path", "")).split(".")[-1])
    options = spec.get("init_args", {} if "class_path" in spec else spec)
    for name, value in (options or {}).items():
        if isinstance(value, str) and value and name in (option, "model", "image_encoder"):
            yield f"{where}.{name}", options, name
        else:
            yield from paths_of(f"{where}.{name}", value)


def require_readable(job: Job) -> None:
    """Opens what a job reads, the first frame of its videos.

    Raises:
        VideoError: Something does not exist, or is no video.
    """
    for option, path in job.inputs.items():
        video = option.endswith((".video", ".mask", ".depth", ".path"))
        expected = "a video file or a folder of images" if video else "a file or folder"
        if not path.exists():
            raise VideoError(f"{path} does not exist; expected {expected} for --{option}")
        if video:
            deep = option.endswith(".depth")
            read_clip(path, max_frames=1, in_memory=False, deep=deep)
