"""What all metrics with a state are: a mean over everything seen, on all processes."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class Average(Metric):
    """A weighted mean. Processes add up sums and weights, so it is that of one process.

    Subclasses have an `update` with the arguments of their function, which calls `add`; NaN where
    nothing was added.
    """

    full_state_update = False
    total: Tensor
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        # float64: a clip has more pixels than float32 can count
        for name in ("total", "weight"):
            zero = torch.zeros((), dtype=torch.float64)
            self.add_state(name, zero, dist_reduce_fx="sum")

    def add(self, values: Tensor) -> None:
        """Every one of the values counts the same."""
        self.total += values.double().sum().to(self.total.device)
        self.weight += values.numel()

    def compute(self) -> Tensor:
        return self.total / self.weight
