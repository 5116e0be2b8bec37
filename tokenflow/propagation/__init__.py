"""Propagation kernels: where each token of a frame is found in the keyframes."""

from tokenflow.propagation.base import Correspondence, Motion, Propagation, Window
from tokenflow.propagation.clip_flow import ClipFlow
from tokenflow.propagation.flow_files import FlowFiles
from tokenflow.propagation.flow_weighted import FlowWeighted
from tokenflow.propagation.kernel_contract import check_correspondence
from tokenflow.propagation.nn_field import NNField
from tokenflow.propagation.optical_flow import DIS, OpticalFlow
from tokenflow.propagation.raft import RAFT

__all__ = [
    "DIS",
    "RAFT",
    "ClipFlow",
    "Correspondence",
    "FlowFiles",
    "FlowWeighted",
    "Motion",
    "NNField",
    "OpticalFlow",
    "Propagation",
    "Window",
    "check_correspondence",
]
