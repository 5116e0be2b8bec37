"""`tokenflow doctor`: what is installed, and what is wrong with it."""

from __future__ import annotations

import platform
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

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


def examine() -> int:
    """Prints one line for each check; returns 1 if anything needed is broken, else 0."""
    print(f"{'python':<{WIDTH}} {platform.python_version()} on {platform.platform()}")
    healthy = all([check_package(name) for name in PACKAGES])
    checks: tuple[tuple[str, Callable[[], str]], ...] = (
        ("accelerator", accelerator),
        ("video", codecs),
        ("miniature", miniature),
        ("plugins", plugins),
    )
    for name, check in checks:
        try:
            print(f"{name:<{WIDTH}} {check()}")
        except Exception as error:  # a broken installation may raise anything
            print(f"{name:<{WIDTH}} BROKEN: {type(error).__name__}: {error}")
            healthy = False
    print("all is well" if healthy else "something is broken, see above")
    return 0 if healthy else 1


def check_package(name: str) -> bool:
    """Prints a package's version, or why it does not import."""
    try:
        found = version(name)
    except PackageNotFoundError:
        print(f"{name:<{WIDTH}} not installed{' (not needed)' if name in OPTIONAL else ''}")
        return name in OPTIONAL
    try:
        import_module(MODULES.get(name, name))
    except Exception as error:  # a broken installation may raise anything
        print(f"{name:<{WIDTH}} {found} BROKEN: {type(error).__name__}: {error}")
        if name == "torchvision" or "torchvision::" in str(error):
            print(
                f"{'':<{WIDTH}} torchvision {version('torchvision')} was not built for torch "
                f"{version('torch')}: pip install --upgrade torch torchvision brings a pair"
            )
        return False
    print(f"{name:<{WIDTH}} {found}")
    return True


def accelerator() -> str:
    """The device that runs would use."""
    import torch

    from tokenflow.diffusion.backbone import default_device

    device = default_device()
    if device != "cuda":
        return f"{device}, {torch.get_num_threads()} threads"
    cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return ", ".join(f"{card.name} with {card.total_memory / 2**30:.0f} GiB" for card in cards)


def codecs() -> str:
    """Raises where the encoder that outputs need is missing."""
    from av.codec import Codec

    return f"encoders {Codec('libx264', 'w').name}, {Codec('aac', 'w').name}"


def miniature() -> str:
    """Raises where the embedded model is not in the package."""
    from tokenflow.diffusion.backbone import EMBEDDED
    from tokenflow.diffusion.stable_diffusion import check_folder

    check_folder(EMBEDDED)
    size = sum(file.stat().st_size for file in EMBEDDED.rglob("*") if file.is_file())
    return f"embedded model, {size / 2**20:.1f} MiB"


def plugins() -> str:
    """Editors and kernels; raises where one is unusable."""
    from tokenflow.errors import PluginError
    from tokenflow.plugins import describe, installed_plugins

    found = installed_plugins()
    if not all(plugin.usable for plugin in found):
        raise PluginError(describe(found))
    return describe(found)
