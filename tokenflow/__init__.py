"""Text-driven video editing with a frozen image model, consistent over time (TokenFlow)."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenflow.diffusion import Backbone
    from tokenflow.editors import ControlNet, PnP, SDEdit
    from tokenflow.engine import Settings, edit_clip
    from tokenflow.propagation import FlowWeighted, NNField
    from tokenflow.video import read_clip, write_clip

__version__ = version("tokenflow")
__all__ = [
    "Backbone",
    "ControlNet",
    "FlowWeighted",
    "NNField",
    "PnP",
    "SDEdit",
    "Settings",
    "edit_clip",
    "read_clip",
    "write_clip",
]

HOMES = {
    "Backbone": "diffusion",
    "ControlNet": "editors",
    "FlowWeighted": "propagation",
    "NNField": "propagation",
    "PnP": "editors",
    "SDEdit": "editors",
    "Settings": "engine",
    "edit_clip": "engine",
    "read_clip": "video",
    "write_clip": "video",
}


def __getattr__(name: str) -> Any:
    """Imports late: `tokenflow --help` need not wait for torch."""
    if name in HOMES:
        return getattr(import_module(f"tokenflow.{HOMES[name]}"), name)
    raise AttributeError(f"module 'tokenflow' has no attribute {name!r}")
