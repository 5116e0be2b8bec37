"""Image editing methods: how keyframes are edited."""

from tokenflow.editors.base import Batch, Editor, Injection, Processor, Prompts, Start, Step
from tokenflow.editors.conditions import Canny, Condition, ControlVideo
from tokenflow.editors.controlnet import Control, ControlNet
from tokenflow.editors.ddcm import DDCM
from tokenflow.editors.flowedit import FlowEdit
from tokenflow.editors.ip_adapter import IPAdapter
from tokenflow.editors.pnp import PnP
from tokenflow.editors.sdedit import SDEdit

__all__ = [
    "DDCM",
    "Batch",
    "Canny",
    "Condition",
    "Control",
    "ControlNet",
    "ControlVideo",
    "Editor",
    "FlowEdit",
    "IPAdapter",
    "Injection",
    "PnP",
    "Processor",
    "Prompts",
    "SDEdit",
    "Start",
    "Step",
]
