"""The frozen models and their mathematics."""

from tokenflow.diffusion.backbone import Backbone, Traits
from tokenflow.diffusion.conditioning import Conditioning
from tokenflow.diffusion.controlnet import FittedControlNet, load_controlnet
from tokenflow.diffusion.flux import Flux
from tokenflow.diffusion.inversion import invert, reconstruct, source_prediction
from tokenflow.diffusion.loading import ModelError
from tokenflow.diffusion.lora import LoRA
from tokenflow.diffusion.noise import frame_noise
from tokenflow.diffusion.schedule import Schedule, guide
from tokenflow.diffusion.sites import Site
from tokenflow.diffusion.stable_diffusion import StableDiffusion
from tokenflow.diffusion.stable_diffusion_3 import StableDiffusion3
from tokenflow.diffusion.stable_diffusion_xl import StableDiffusionXL
from tokenflow.diffusion.textual_inversion import Embedding
from tokenflow.diffusion.trajectory import Source, Trajectory

__all__ = [
    "Backbone",
    "Conditioning",
    "Embedding",
    "FittedControlNet",
    "Flux",
    "LoRA",
    "ModelError",
    "Schedule",
    "Site",
    "Source",
    "StableDiffusion",
    "StableDiffusion3",
    "StableDiffusionXL",
    "Traits",
    "Trajectory",
    "frame_noise",
    "guide",
    "invert",
    "load_controlnet",
    "reconstruct",
    "source_prediction",
]
