"""The benchmark of the fast mode: its table, from results that are made up."""

from __future__ import annotations

from typing import Any

from benchmarks.fast import DEFAULT, FAST, PLAN, ROWS, table
from benchmarks.scenes.rows import FLOOR
from tokenflow.engine import Settings


def record(row: str, seed: int, seconds: float, error: float, kept: float = 1.0) -> dict[str, Any]:
    measured = {"seconds": seconds, "evaluations": 10 * seconds, "warp_error_1": error}
    return {"row": row, "case": {"seed": seed}, "edited": 1.0, "kept": kept, "psnr": 20, **measured}


def test_a_row_is_compared_on_the_clips_that_it_shares_with_the_default() -> None:
    records = [
        *(record(FLOOR, seed, 1, 0.001) for seed in (1, 2, 3)),
        *(record(DEFAULT, seed, 80, 0.005) for seed in (1, 2, 3)),
        record(FAST, 1, 20, 0.003), record(FAST, 2, 16, 0.005, kept=0.5),
    ]  # fmt: skip
    columns, default, fast = table(records, (DEFAULT, FAST, "15 steps"), PLAN).lines
    assert dict(zip(columns, default, strict=True))["clips"] == "3"
    assert dict(zip(columns, fast, strict=True)) == {
        "": FAST, "clips": "2", "time": "4.50 (4.00 to 5.00)", "evaluations": "4.50",
        "error": "0.75", "warp error ×10⁻³": "4.00", "edited": "100% (100%)", "kept": "75% (100%)",
        "PSNR, dB": "20.0",
    }  # fmt: skip


def test_every_row_is_a_choice_of_settings() -> None:
    for options in ROWS.values():
        assert vars(Settings(**options)).items() >= options.items()
