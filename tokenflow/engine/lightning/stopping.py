"""Ends a run that was asked to stop, on every rank."""

from __future__ import annotations

from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback

from tokenflow.engine.lightning.module import TokenFlow
from tokenflow.errors import Preempted


class Stopping(Callback):
    """Passes a rank's request to stop on to the others before it ends."""

    def on_exception(  # type: ignore[override]
        self, trainer: Trainer, module: TokenFlow, exception: BaseException
    ) -> None:
        module.preemption.close()
        environment = getattr(trainer.strategy, "cluster_environment", None)  # one device has none
        launched = isinstance(environment, LightningEnvironment) and trainer.local_rank > 0
        if launched and isinstance(exception, Preempted):
            exception.code = (
                0  # Lightning's launcher kills the others after any other; rank 0's counts
            )
