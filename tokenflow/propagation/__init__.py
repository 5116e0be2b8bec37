"""Propagation kernels: where each token of a frame is found in the keyframes."""

from tokenflow.propagation.base import Correspondence, Motion, Propagation, Window
from tokenflow.propagation.clip_flow import ClipFlow
from tokenflow.propagation.flow.base import OpticalFlow, warp
from tokenflow.propagation.flow.dis import DIS
from tokenflow.propagation.flow.files import FlowFiles
from tokenflow.propagation.flow.raft import RAFT
from tokenflow.propagation.flow_weighted import FlowWeighted
from tokenflow.propagation.kernel_contract import check_correspondence
from tokenflow.propagation.latent_flow import LatentFlow
from tokenflow.propagation.nn_field import NNField

__all__ = [
    "DIS",
    "RAFT",
    "ClipFlow",
    "Correspondence",
    "FlowFiles",
    "FlowWeighted",
    "LatentFlow",
    "Motion",
    "NNField",
    "OpticalFlow",
    "Propagation",
    "Window",
    "check_correspondence",
    "warp",
]
