"""Image editing methods: what becomes of the keyframes."""

from tokenflow.editors.base import Edit, Editor, Pass, Start
from tokenflow.editors.conditions import Canny, Condition, ControlVideo
from tokenflow.editors.controlnet import Control, ControlNet
from tokenflow.editors.pnp import PnP
from tokenflow.editors.sdedit import SDEdit

__all__ = [
    "Canny",
    "Condition",
    "Control",
    "ControlNet",
    "ControlVideo",
    "Edit",
    "Editor",
    "Pass",
    "PnP",
    "SDEdit",
    "Start",
]
