"""What is measured on an accelerator runs on a CPU, at a tiny size."""

from __future__ import annotations

from pathlib import Path

import accelerator
import pytest


def test_all_rows_at_a_tiny_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "fast.yaml").write_text("model:\n  steps: 1\n")
    monkeypatch.setattr(accelerator, "FAST", tmp_path / "fast.yaml")
    accelerator.rows(
        "cpu", ("float32",), frames=5, steps=1, rounds=1, preset_frames=3, memory=(3,), tiny=True
    )
    said = capsys.readouterr().out
    for name in ("float32, first edit", "float32, second edit", "fast preset", "memory, 3 frames"):
        assert said.count(name) >= 2  # as it is measured, and in the table
