"""Ends a run that was asked to stop, on every rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback

from tokenflow.errors import Preempted

if TYPE_CHECKING:
    from tokenflow.engine.lightning.module import TokenFlow


class Stopping(Callback):
    """Passes a rank's request to stop on to the others before it ends."""

    def on_exception(  # type: ignore[override]
        self, trainer: Trainer, module: TokenFlow, exception: BaseException
    ) -> None:
        module.preemption.close()
        environment = getattr(trainer.strategy, "cluster_environment", None)  # one device has none
        launched = isinstance(environment, LightningEnvironment) and trainer.local_rank > 0
        if launched and isinstance(exception, Preempted):
            # Lightning's launcher kills all after any other code; that of rank 0 is the job's
            exception.code = 0
