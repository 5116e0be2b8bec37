"""Weights of torchvision's networks, from files that the user has."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from tokenflow.errors import InputError

BROKEN = (EOFError, OSError, RuntimeError, SafetensorError, TypeError, pickle.UnpicklingError)


def load_torchvision(
    network: nn.Module, file: Path, name: str, named: Callable[[str], str] = str
) -> None:
    """Loads all of a network's weights.

    Args:
        network: Gets them.
        file: As torchvision publishes it (.pth) or as .safetensors.
        name: What torchvision calls the network that the file is of.
        named: The file's name of a parameter, by the network's; the same when not given.

    Raises:
        InputError: There is no such file, it does not fit, or it holds more than tensors.
    """
    if not file.is_file():
        raise InputError(
            f"there are no weights at {file}; expected a file of torchvision's {name} as .pth or "
            f".safetensors"
        )
    try:
        held = read(file)
        names = {own: named(own) for own in network.state_dict()}
        network.load_state_dict({own: held[its] for own, its in names.items() if its in held})
    except BROKEN as error:
        # torch's own words advise to load pickles that may run code
        tensors_only = isinstance(error, pickle.UnpicklingError)
        reason = "it holds more than tensors, or is damaged" if tensors_only else error
        raise InputError(
            f"{file} does not load as torchvision's {name}: {reason}; give the file of this very "
            f"network, as it was published"
        ) from error


def read(file: Path) -> dict[str, Any]:
    """Tensors by name; a pickle may hold nothing else."""
    if file.suffix == ".safetensors":
        return load_file(file)
    held = torch.load(file, map_location="cpu", weights_only=True)
    if not (isinstance(held, dict) and all(isinstance(name, str) for name in held)):
        raise TypeError(f"expected tensors by name, got a {type(held).__name__}")
    return held
