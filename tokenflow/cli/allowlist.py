"""What a configuration may name: nothing that runs code, unless the command line allows it."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import PurePath
from typing import Any

from jsonargparse import set_parsing_settings
from lightning.pytorch import callbacks, loggers, profilers

from tokenflow import HOMES
from tokenflow.errors import InputError
from tokenflow.plugins import installed_plugins

# classes one by one: whatever Lightning has with a function for an argument, as LambdaCallback,
# would call for a configuration any function of the packages that are allowed, with any arguments
LIGHTNING = (
    callbacks.DeviceStatsMonitor,
    loggers.CSVLogger,
    loggers.TensorBoardLogger,
    profilers.AdvancedProfiler,
    profilers.SimpleProfiler,
)
TOKENFLOW = ("tokenflow.editors", "tokenflow.propagation")
VALUES = (
    "tokenflow.diffusion.LoRA", "tokenflow.diffusion.lora.LoRA",
    "tokenflow.diffusion.Embedding", "tokenflow.diffusion.textual_inversion.Embedding",
)  # fmt: skip
"""Options' own classes, by both their paths: they hold numbers and text."""


def restrict(allowed: Iterable[str] = ()) -> None:
    """Limits class paths to ours, classes in plugins' loaded modules, `LIGHTNING` and `allowed`."""
    kinds = [plugin.kind for plugin in installed_plugins() if plugin.kind is not None]
    packages = {kind.__module__.split(".")[0] for kind in kinds} - {"tokenflow"}
    # what plugins have imported themselves; another module, as __main__, would run for it
    loaded = [m for name, m in sorted(sys.modules.copy().items()) if name.split(".")[0] in packages]
    # a class has two paths, its own module's and the public one: lightning.pytorch.FAMILY.NAME
    homes = [(kind.__module__, kind.__name__) for kind in LIGHTNING]
    public = [(".".join(module.split(".")[:3]), name) for module, name in homes]
    names = [f"{module}.{name}" for module, name in homes + public]
    # NNField is tokenflow.NNField too, which jsonargparse takes for its name
    names += [
        f"{module.__name__}.{name}"
        for module in loaded
        for name, value in vars(module).items()
        if isinstance(value, type) and value.__module__.split(".")[0] in packages
    ]
    names += [f"tokenflow.{name}" for name in HOMES if f"tokenflow.{HOMES[name]}" in TOKENFLOW]
    set_parsing_settings(
        import_path_denylist=["*"],
        import_path_allowlist=[*TOKENFLOW, *VALUES, *names, *allowed],
        # else a value of any type would be made from whatever class or function it names
        instantiate_subclass_spec_in_any=False,
        # Lightning turns it on: a URL where a file or its content may stand would be fetched
        config_read_mode_fsspec_enabled=False,
        config_read_mode_urls_enabled=False,
    )


def require_local(options: Any) -> None:
    """Raises `InputError` for a URL among the trainer's options or those of `LIGHTNING`'s classes.

    They go to fsspec, which makes network requests for a path like `reference::http://…`. Other
    classes are there because the command line allows them.
    """
    if isinstance(options, str | PurePath):
        if "://" in str(options) or "::" in str(options):
            raise InputError(
                f"expected local paths in the trainer's options, got {str(options)!r}: a "
                f"configuration may make no network requests; name a folder"
            )
    elif isinstance(options, list | tuple):
        for one in options:
            require_local(one)
    elif isinstance(options, dict):
        kind = options.get("class_path", "").split(".")[-1]
        if kind in ("", *(known.__name__ for known in LIGHTNING)):
            require_local(list(options.values()))
