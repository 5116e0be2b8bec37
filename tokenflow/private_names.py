"""The names of other libraries that are used though they are not public, all of them.

An update of a library may remove them; `constraints.txt` pins the versions that have them.
"""

from __future__ import annotations

from typing import Any


def dump_config(cli: Any) -> dict[str, Any]:
    """The configuration of a LightningCLI after instantiation, as YAML holds it.

    The instantiator dumps it itself, by this method, and a second dump would differ.
    """
    cli._dump_config()
    return cli.config_dump


def forks(launcher: object) -> bool:
    """Whether a launcher forks or spawns processes, whose exit codes are lost."""
    from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

    return isinstance(launcher, _MultiProcessingLauncher)


def lpips_network() -> Any:
    """torchmetrics' LPIPS on AlexNet without weights: its public class downloads them."""
    from torchmetrics.functional.image.lpips import _NoTrainLpips

    return _NoTrainLpips(net="alex", pnet_rand=True)
