"""Measuring during predict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer

from tokenflow.editors import SDEdit
from tokenflow.engine import measuring
from tokenflow.engine.measuring import Measuring, Sources
from tokenflow.engine.module import TokenFlow
from tokenflow.engine.writer import RunWriter
from tokenflow.propagation import NNField
from tokenflow.report import Run


def test_nothing_of_a_clip_is_kept_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Sources] = []

    def leave(sources: Sources, *_: Any) -> None:
        seen.append(sources)

    monkeypatch.setattr(measuring, "leave", leave)
    writer, metrics = RunWriter(), Measuring(measure=True)
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[writer, metrics]
    )
    metrics.on_predict_start(trainer, TokenFlow(SDEdit(), NNField()))
    for name in ("one", "two"):
        writer.measure(Run(Path(name), {}))
    assert seen[0] is not seen[1]
    assert seen[0].measures is seen[1].measures  # networks are loaded once
