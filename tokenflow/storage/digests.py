"""SHA-256 digests of values, tensors and networks, in hexadecimal."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def of_values(*values: Any) -> str:
    """Of what JSON makes of the values; what it does not know, by its text."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def of_path(path: Path) -> str:
    """Of a file's bytes, or of the names and bytes of a folder's files; about 1 GB a second."""
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file())
        return of_values([(file.name, of_path(file)) for file in files])
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Of names, shapes, types and bytes, one tensor after the other in host memory."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous().cpu()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def of_network(network: nn.Module) -> str:
    """Of all weights and of the configuration, but for where it was loaded from.

    A GB takes about 0.7 s.
    """
    config: Any = network.config
    known = config if isinstance(config, Mapping) else config.to_dict()
    own = {name: value for name, value in known.items() if not name.startswith("_")}
    return of_values(own, of_tensors(network.state_dict()))
