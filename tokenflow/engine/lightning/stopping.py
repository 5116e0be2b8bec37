"""Ends a run that was asked to stop, on every rank."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback

from tokenflow.engine.ranks.preemption import Preemption
from tokenflow.errors import Preempted


@runtime_checkable
class Preemptible(Protocol):
    """A module whose ranks stop together."""

    preemption: Preemption


class Stopping(Callback):
    """Passes a rank's request to stop on to the others before it ends."""

    def on_exception(  # type: ignore[override]
        self, trainer: Trainer, module: Preemptible, exception: BaseException
    ) -> None:
        module.preemption.close()
        if isinstance(exception, Preempted) and not counts(trainer):
            exception.code = 0


def counts(trainer: Trainer) -> bool:
    """Whether the launcher needs this rank's exit code.

    After one with an exit code above 0 Lightning's and srun end all others; that of rank 0, which
    ends last, is the job's.
    """
    environment = getattr(trainer.strategy, "cluster_environment", None)  # one device has none
    if isinstance(environment, LightningEnvironment):
        return trainer.local_rank == 0
    return trainer.is_global_zero or not isinstance(environment, SLURMEnvironment)
