"""What a plugin must leave as it was: the process's own state, and the backbone."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tokenflow.diffusion import Backbone

GLOBAL: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "torch's random state": (
        lambda: torch.get_rng_state().numpy(),
        lambda state: torch.set_rng_state(torch.from_numpy(state)),
    ),
    "NumPy's random state": (np.random.get_state, np.random.set_state),
    "torch's gradient mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "torch's default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "torch's deterministic mode": (
        torch.are_deterministic_algorithms_enabled,
        torch.use_deterministic_algorithms,
    ),
}
"""What all of a process shares: how to get it and how to set it."""


@contextmanager
def restored() -> Iterator[None]:
    """Puts the global state back."""
    before = {name: get() for name, (get, _) in GLOBAL.items()}
    try:
        yield
    finally:
        for name, (_, put) in GLOBAL.items():
            put(before[name])


def global_state() -> dict[str, bytes]:
    """What it is now, to be compared."""
    return {name: pickle.dumps(get()) for name, (get, _) in GLOBAL.items()}


def backbone_state(model: Backbone) -> dict[str, object]:
    """What an edit must leave as it was, by name."""
    found: dict[str, object] = {}
    networks = {part: name for name, part in vars(model).items() if isinstance(part, nn.Module)}
    networks[model.network] = "network"  # whatever else the model calls it
    for network, name in networks.items():
        own = [vars(module) for module in network.modules()]
        found |= {
            f"hooks of the {name}": sum(
                len(value) for each in own for key, value in each.items() if key.endswith("_hooks")
            ),
            f"training flags of the {name}": sum(each["training"] for each in own),
            f"methods of the {name}": sum("forward" in each for each in own),
            f"attention processors of the {name}": [
                processor for each in own if (processor := each.get("processor")) is not None
            ],
            f"weights of the {name}": digest(network.state_dict().values()),
        }
    schedules = [model.schedule(steps) for steps in (1, 2)]
    return found | {"noise schedule": schedules}


def digest(tensors: Iterable[Tensor]) -> str:
    """A short word for the values of tensors."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()[:8]
