"""The frozen model and its mathematics."""

from tokenflow.diffusion.backbone import Backbone, ModelError
from tokenflow.diffusion.inversion import invert, reconstruct
from tokenflow.diffusion.sampling import Schedule
from tokenflow.diffusion.trajectory import Trajectory

__all__ = ["Backbone", "ModelError", "Schedule", "Trajectory", "invert", "reconstruct"]
