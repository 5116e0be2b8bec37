"""The frozen model and its mathematics."""

from tokenflow.diffusion.backbone import Backbone
from tokenflow.diffusion.controlnet import load_controlnet
from tokenflow.diffusion.inversion import invert, reconstruct, source_noise
from tokenflow.diffusion.loading import ModelError
from tokenflow.diffusion.sampling import Schedule
from tokenflow.diffusion.trajectory import Trajectory

__all__ = [
    "Backbone",
    "ModelError",
    "Schedule",
    "Trajectory",
    "invert",
    "load_controlnet",
    "reconstruct",
    "source_noise",
]
