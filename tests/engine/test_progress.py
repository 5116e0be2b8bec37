import pytest
from lightning.pytorch import LightningModule, Trainer

from tokenflow.engine import progress
from tokenflow.engine.progress import StageProgress


def test_without_a_terminal_lines_tell_stage_step_and_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter(range(0, 1000, 10))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(now)))
    shown, module = StageProgress(interval=15.0), LightningModule()
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    shown.on_predict_start(trainer, module)
    for step in range(1, 6):
        module.progress("edit", step, 5)
    shown.on_predict_end(trainer, module)
    assert capsys.readouterr().err.splitlines() == [
        "edit: 3/5, 20 s left",
        "edit: 5/5, 0 s left",
    ]


def test_only_the_first_rank_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "is_global_zero", False)
    module = LightningModule()
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    StageProgress().on_predict_start(trainer, module)
    assert not hasattr(module, "progress")
