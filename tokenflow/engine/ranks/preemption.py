"""Stopping where a run can go on: on SIGTERM and SIGUSR1, by which schedulers announce its end."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from subprocess import Popen, TimeoutExpired
from types import FrameType
from typing import Any

from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from tokenflow.engine.lightning.module import TokenFlow
from tokenflow.errors import Preempted

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
GRACE = 300.0
"""Seconds that the first process gives those it launched to finish their step."""
PR_SET_PDEATHSIG = 1


class StopSignals(Callback):
    """Notes that the run was asked to stop; it does so after the step, when all ranks know.

    Lightning's own handlers, which predict does not heed, or which requeue a job that has saved
    nothing, are put aside.
    """

    def __init__(self) -> None:
        self.asked = False
        self.before: dict[int, Any] = {}
        self.child = False
        self.children: list[Popen[Any]] = []

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        strategy = trainer.strategy
        environment = getattr(strategy, "cluster_environment", None)  # one device has none
        if isinstance(environment, LightningEnvironment):
            self.child = trainer.local_rank > 0
            if not self.child and isinstance(strategy.launcher, _SubprocessScriptLauncher):
                self.children = strategy.launcher.procs
        self.before = {number: signal.signal(number, self.note) for number in SIGNALS}
        module.asked = lambda: self.asked  # type: ignore[assignment]

    def on_predict_start(self, trainer: Trainer, module: LightningModule) -> None:
        for number in SIGNALS:  # Lightning has set its own since `setup`
            signal.signal(number, self.note)

    def note(self, number: int, frame: FrameType | None) -> None:
        """The handler, which also tells the processes that this one launched."""
        self.asked = True
        for process in self.children:
            process.send_signal(number)

    def teardown(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        self.restore()

    def on_exception(  # type: ignore[override]
        self, trainer: Trainer, module: TokenFlow, exception: BaseException
    ) -> None:
        self.restore()
        if module.channel is not None:
            stopped = isinstance(exception, Preempted)
            module.channel.close(stopped=stopped, failed=not stopped)
        if not isinstance(exception, Preempted):
            return
        if self.child:
            exception.code = 0  # the launcher takes another for a crash; the first rank's counts
        for process in self.children:
            try:
                process.wait(GRACE)
            except TimeoutExpired:
                process.kill()

    def restore(self) -> None:
        """Puts the handlers of before back."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}


def end_with_parent(parent: int) -> None:
    """Asks Linux to kill this process when the one that launched it ends, however it ends.

    Ends it now if that is no longer its `parent`.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            raise Preempted
