"""What is reported of a run's clips and their stages."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import pytest
from lightning.pytorch import Trainer

from tokenflow.editors import PnP
from tokenflow.engine.lightning.job import ClipSource, Job
from tokenflow.engine.lightning.module import TokenFlowModule
from tokenflow.engine.lightning.progress import StageProgress
from tokenflow.engine.progress import Reporter
from tokenflow.propagation import NNField

TRAINER = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)


def test_while_a_clip_is_inverted_the_eta_includes_the_edit(
    capsys: pytest.CaptureFixture[str],
) -> None:
    job = Job(ClipSource(Path("in.mp4")))
    for chosen in ({"keyframe_every": 2}, {"consistency": "none"}):
        module = TokenFlowModule(
            PnP(), NNField(), "a ball", cache=None, steps=4, inversion_steps=8, **chosen
        )
        shown = StageProgress()
        shown.reporter = Reporter(0.0, count(0.0, 5.0).__next__)
        shown.on_predict_batch_start(TRAINER, module, job, 0)
        shown.on_edit_step(TRAINER, module, "invert", 1, 8)
        shown.on_edit_step(TRAINER, module, "invert", 2, 8)
    shown.on_edit_step(TRAINER, module, "cached", 1, 2)  # half of the frames, and all are edited
    shown.on_edit_step(TRAINER, module, "invert", 6, 8)
    lines = [line for line in capsys.readouterr().err.splitlines() if "each" in line]
    assert lines == [
        "invert: 2/8, 10.0 s each, ETA 0:04:00 including the edit",  # 60 + 10 · 8 · 3 · 1.5 · 4/8
        "invert: 2/8, 10.0 s each, ETA 0:03:00 including the edit",
        "invert: 6/8, 6.0 s each, ETA 0:02:36 including the edit",
    ]


def test_only_rank_zero_reports(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = TokenFlowModule(PnP(), NNField(), cache=None)
    for first in (True, False):
        monkeypatch.setattr(Trainer, "is_global_zero", first)
        shown = StageProgress()
        shown.on_predict_start(TRAINER, module)
        shown.on_edit_step(TRAINER, module, "edit", 2, 2)
        shown.on_predict_end(TRAINER, module)
        assert capsys.readouterr().err == ("edit: 2/2\n" if first else "")
