"""Text-driven video editing with a frozen image model, consistent over time (TokenFlow)."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenflow.diffusion import Backbone, StableDiffusion
    from tokenflow.editors import (
        DDCM,
        ControlNet,
        Editor,
        FlowEdit,
        IPAdapter,
        PnP,
        Prompts,
        SDEdit,
    )
    from tokenflow.engine import (
        Consistency,
        Result,
        Settings,
        edit_clip,
        edit_latents,
        find_correspondences,
    )
    from tokenflow.propagation import FlowWeighted, NNField, Propagation
    from tokenflow.report import draw_correspondences
    from tokenflow.video import Clip, read_clip, write_clip, write_image

__version__ = version("tokenflow")
__all__ = [
    "DDCM",
    "Backbone",
    "Clip",
    "Consistency",
    "ControlNet",
    "Editor",
    "FlowEdit",
    "FlowWeighted",
    "IPAdapter",
    "NNField",
    "PnP",
    "Prompts",
    "Propagation",
    "Result",
    "SDEdit",
    "Settings",
    "StableDiffusion",
    "draw_correspondences",
    "edit_clip",
    "edit_latents",
    "find_correspondences",
    "read_clip",
    "write_clip",
    "write_image",
]

HOMES = {
    "DDCM": "editors",
    "Backbone": "diffusion",
    "Clip": "video",
    "Consistency": "engine",
    "ControlNet": "editors",
    "Editor": "editors",
    "FlowEdit": "editors",
    "FlowWeighted": "propagation",
    "IPAdapter": "editors",
    "NNField": "propagation",
    "PnP": "editors",
    "Prompts": "editors",
    "Propagation": "propagation",
    "Result": "engine",
    "SDEdit": "editors",
    "Settings": "engine",
    "StableDiffusion": "diffusion",
    "draw_correspondences": "report",
    "edit_clip": "engine",
    "edit_latents": "engine",
    "find_correspondences": "engine",
    "read_clip": "video",
    "write_clip": "video",
    "write_image": "video",
}


def __getattr__(name: str) -> Any:
    """Imports late: `tokenflow --help` need not wait for torch."""
    if name in HOMES:
        return getattr(import_module(f"tokenflow.{HOMES[name]}"), name)
    raise AttributeError(f"module 'tokenflow' has no attribute {name!r}")
