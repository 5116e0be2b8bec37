"""Propagation kernels: where each token of a frame is found in the keyframes."""

from tokenflow.propagation.base import Correspondence, Propagation, Window
from tokenflow.propagation.nn_field import NNField

__all__ = ["Correspondence", "NNField", "Propagation", "Window"]
