"""`tokenflow doctor`: what is installed, and what is wrong with it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from runpy import run_path

from packaging.requirements import Requirement

from tokenflow.cli.stop import HELP
from tokenflow.errors import InputError, PluginError
from tokenflow.miniature import LCM, TRANSFORMER, WEIGHTS
from tokenflow.plugins import Plugin, describe, installed_plugins, offered_plugins

PACKAGES = (
    "tokenflow",
    "torch",
    "torchvision",
    "lightning",
    "diffusers",
    "transformers",
    "accelerate",
    "safetensors",
    "jsonargparse",
    "av",
    "opencv-python-headless",
)
OPTIONAL = ("torchvision",)
MODULES = {"opencv-python-headless": "cv2"}  # where a package's module has another name
WIDTH = max(map(len, PACKAGES))
USAGE = """\
usage: tokenflow doctor
       tokenflow doctor --imports

Shows versions, accelerator, codecs and plugins, and what is wrong with them; exit code 1 if
anything is. With --imports, every package and plugin is imported, too, which takes some 10 s and
finds a package that was built for another version of its neighbour.
"""
CARDS = ("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader")


def run(words: list[str]) -> int | None:
    """Prints one line for each check; returns 1 if anything needed is broken, else 0.

    With --imports, packages and plugins are imported, and torch is asked for the device.

    Raises:
        InputError: There are other words.
    """
    if words[:1] and words[0] in HELP:
        print(USAGE, end="")
        return None
    if words not in ([], ["--imports"]):
        raise InputError(
            f"tokenflow doctor takes no options, got {' '.join(words)!r}, but for --imports"
        )
    imports = bool(words)
    print(f"{'python':<{WIDTH}} {platform.python_version()} on {platform.platform()}")
    healthy = all([check_package(name, unimportable if imports else unmet) for name in PACKAGES])
    checks: tuple[tuple[str, Callable[[], str]], ...] = (
        ("accelerator", device if imports else cards),
        ("video", codecs),
        ("miniature", miniature),
        ("plugins", loaded if imports else offered),
    )
    for name, check in checks:
        try:
            print(f"{name:<{WIDTH}} {check()}")
        except Exception as error:  # a broken installation may raise anything
            print(f"{name:<{WIDTH}} BROKEN: {type(error).__name__}: {error}")
            healthy = False
    if not healthy:
        print("something is broken, see above")
    elif imports:
        print("all is well")
    else:
        print("all is well, though nothing was imported; tokenflow doctor --imports does that, too")
    return 0 if healthy else 1


def check_package(name: str, fault: Callable[[str], str]) -> bool:
    """Prints a package's version, and what is wrong with it, if anything is."""
    try:
        found = version(name)
    except PackageNotFoundError:
        print(f"{name:<{WIDTH}} not installed{' (not needed)' if name in OPTIONAL else ''}")
        return name in OPTIONAL
    wrong = fault(name)
    print(f"{name:<{WIDTH}} {found}{f' BROKEN: {wrong}' if wrong else ''}")
    return not wrong


def unmet(name: str) -> str:
    """Which of the other packages a package needs in another version, by its metadata."""
    found = []
    for needed in map(Requirement, requires(name) or ()):
        if needed.name in PACKAGES and (needed.marker is None or needed.marker.evaluate()):
            with suppress(PackageNotFoundError):  # which has a line of its own
                other = version(needed.name)
                if not needed.specifier.contains(other, prereleases=True):
                    found.append(f"it needs {needed.name}{needed.specifier}, installed is {other}")
    return f"{'; '.join(found)}: pip install --upgrade both" if found else ""


def unimportable(name: str) -> str:
    """Why a package does not import, if it does not."""
    try:
        import_module(MODULES.get(name, name))
    except Exception as error:  # a broken installation may raise anything
        reason = f"{type(error).__name__}: {error}"
        if name == "torchvision" or "torchvision::" in str(error):
            reason += (
                f"\n{'':<{WIDTH}} torchvision {version('torchvision')} was not built for torch "
                f"{version('torch')}: pip install --upgrade torch torchvision brings a pair"
            )
        return reason
    return ""


def device() -> str:
    """The device that runs would use, by torch."""
    import torch

    from tokenflow.diffusion.backbone import default_device

    found = default_device()
    if found != "cuda":
        return f"{found}, {torch.get_num_threads()} threads"
    cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return ", ".join(f"{card.name} with {card.total_memory / 2**30:.0f} GiB" for card in cards)


def cards() -> str:
    """NVIDIA's cards, if there are any and torch was built for them, by what its files say."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        raise ImportError("torch is not installed")
    cuda = run_path(str(Path(spec.origin).with_name("version.py")))["cuda"]
    found = ""
    if shutil.which(CARDS[0]):
        done = subprocess.run(CARDS, capture_output=True, text=True, timeout=10, check=False)
        found = ", ".join(done.stdout.splitlines()) if done.returncode == 0 else ""
    if not found:
        return f"none found by {CARDS[0]}, {os.cpu_count()} CPU threads"
    if cuda is None:
        raise ImportError(f"{found} cannot be used: this torch is built without CUDA")
    return f"{found}; torch is built for CUDA {cuda}"


def codecs() -> str:
    """Raises where the encoder that outputs need is missing."""
    from av.codec import Codec

    return f"encoders {Codec('libx264', 'w').name}, {Codec('aac', 'w').name}"


def miniature() -> str:
    """Raises where a part of an embedded model is not in the package."""
    models = {WEIGHTS: "unet", LCM: "unet", TRANSFORMER: "transformer"}
    parts = [m / part for m, net in models.items() for part in (net, "vae", "text_encoder")]
    if missing := [str(part) for part in parts if not any(part.glob("*.safetensors"))]:
        raise FileNotFoundError(f"no weights in {', '.join(missing)}; install tokenflow again")
    size = sum(file.stat().st_size for m in models for file in m.rglob("*") if file.is_file())
    return f"{len(models)} embedded models, {size / 2**20:.1f} MiB"


def offered() -> str:
    """Editors and kernels by what their packages say; raises where two have one name."""
    return sound(offered_plugins())


def loaded() -> str:
    """Editors and kernels; raises where one is unusable."""
    return sound(installed_plugins())


def sound(plugins: tuple[Plugin, ...]) -> str:
    """The plugins' names; `PluginError` if one is unusable."""
    if not all(plugin.usable for plugin in plugins):
        raise PluginError(describe(plugins))
    return describe(plugins)
