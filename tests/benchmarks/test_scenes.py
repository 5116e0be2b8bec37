"""The benchmark with ground truth: its suite, and its quick part from start to end."""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.scenes import __main__ as command
from benchmarks.scenes.measure import Truth
from benchmarks.scenes.rows import (
    FLOOR,
    KNOWN,
    SOURCE,
    TRUTH,
    Plan,
    Workbench,
    counted,
)
from benchmarks.scenes.sheet import BETWEEN, WIDTH
from benchmarks.scenes.suite import EDITS, MOTIONS, cases
from tokenflow.errors import InputError
from tokenflow.miniature.judge import Judge

METRICS = ("warp_error_1", "edited", "kept", "psnr_inside", "psnr", "seconds")
CHANGED = {
    "colour": ("color",),
    "pattern": ("pattern",),
    "background": ("background",),
    "shape": ("shape",),
}


def test_the_suite_has_every_motion_with_every_edit_once() -> None:
    suite = cases()
    assert Counter((c.motion, c.edit) for c in suite) == Counter(product(MOTIONS, EDITS))
    assert len({c.seed for c in suite}) == len(suite) >= 24
    for case in suite:
        changed = case.of(1).changed
        assert changed == CHANGED.get(case.edit, changed)
        assert len(changed) == (2 if case.edit == "two" else 1), case


def test_clips_move_as_their_kind_says() -> None:
    first = {c.motion: c.of(16).scene for c in reversed(cases())}
    speed = {
        name: torch.stack([scene.object.x.diff(), scene.object.y.diff()]).norm(dim=0)
        for name, scene in first.items()
    }
    torch.testing.assert_close(speed["translation"], torch.full((15,), 2.5))
    torch.testing.assert_close(speed["fast"], torch.full((15,), 6.0))
    assert first["rotation"].object.angle.diff().mean() == pytest.approx(0.1)
    assert first["scaling"].object.scale[-1] / first["scaling"].object.scale[0] > 1.5
    leaving = first["leaving"].object
    assert leaving.x.max() > 119
    assert [float(leaving.x[i]) for i in (0, -1)] == pytest.approx([84, 84])
    assert first["pan"].background.x.diff().abs().sum() > 0
    hidden = [first["bar"].mask(i).sum() for i in (0, 8)]
    assert hidden[1] < 0.85 * hidden[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    (folder / "page.md").write_text(
        "before\n<!-- measured: begin -->old<!-- measured: end -->\nafter\n"
    )
    command.main(folder, quick=True, page=folder / "page.md")
    return folder


def records(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "results.jsonl").read_text().split("\n")
    return [json.loads(line) for line in lines if line]


def test_every_row_of_every_clip_is_measured(run: Path) -> None:
    found = records(run)
    rows = Counter(r["row"] for r in found)
    assert rows == dict.fromkeys(command.QUICK_ROWS, 2)
    for record in found:
        assert all(math.isfinite(record[name]) for name in METRICS), record
        background = "background" in record["case"]["edit"]
        assert (record["psnr_outside"] is None) == background
        assert (run / f"{record['case']['seed']} {record['row']}.png").exists()


def test_the_true_edit_is_the_best_there_is(run: Path) -> None:
    found = records(run)
    for truth in (r for r in found if r["row"] == TRUTH):
        assert truth["psnr_inside"] == truth["psnr"] == 100
        assert truth["edited"] >= 0.8
        assert truth["kept"] >= 0.8
        for other in found:
            if other["case"] == truth["case"] and other is not truth:
                assert other["psnr"] < 50
                assert other["warp_error_1"] > truth["warp_error_1"]


def test_evaluations_are_counted(run: Path) -> None:
    """4 frames, 2 steps: inversion, then 3 branches, where keyframes take one pass as well."""
    found = {r["row"]: r["evaluations"] for r in records(run)}
    assert found[FLOOR] == 0
    assert found["per-frame PnP"] == 2 * 4 + 2 * 3 * 4
    assert found["TokenFlow"] == 2 * 4 + 2 * 3 * 4


def test_evaluations_are_the_batch_of_whatever_a_network_is_given() -> None:
    class Network(torch.nn.Module):
        def forward(self, hidden_states: torch.Tensor, **_: torch.Tensor) -> torch.Tensor:
            return hidden_states

    network, x = Network(), torch.zeros(3, 4)
    with counted(network) as cost:
        network(x)
        network(hidden_states=x[:2], timestep=x)
    network(x)
    assert cost.evaluations == 5


def test_nothing_is_measured_twice(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, *rest = (run / "results.jsonl").read_text().split("\n\n")
    torn = first[:-20]  # a killed process's last line
    (tmp_path / "results.jsonl").write_text("\n\n".join([*rest, torn]))
    made: list[str] = []
    make = command.Workbench.make
    monkeypatch.setattr(
        command.Workbench, "make", lambda self, row: made.append(row) or make(self, row)
    )
    command.main(tmp_path, quick=True)
    assert made == [TRUTH]
    command.main(tmp_path, quick=True)
    assert made == [TRUTH]
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write(rest[0] + "\n")  # of another process that was at it, too
    measured = command.Results(tmp_path / "results.jsonl", "").records(command.QUICK)
    assert len(measured) == len(records(run))


def test_what_nothing_is_outside_of_has_no_metric() -> None:
    truth = Truth(cases()[20].of(2))
    assert truth.measure(truth.frames, Judge.load())["psnr_outside"] == 100
    truth.outside[:] = False
    assert truth.measure(truth.frames, Judge.load())["psnr_outside"] is None


@pytest.mark.full
def test_every_row_can_be_made() -> None:
    plan = Plan(frames=2, steps=1, reference_inversion=2, keyframe_every=1)
    bench = Workbench(Truth(cases()[20].of(2)), plan)
    for row in (TRUTH, FLOOR, SOURCE, *KNOWN):
        frames, cost = bench.make(row)
        assert frames.shape == (2, 3, 128, 128)
        assert (cost.evaluations > 0) == (row in KNOWN), row


def test_another_plan_is_measured_anew(run: Path) -> None:
    missing = command.Results(run / "results.jsonl", "").missing
    assert missing(cases()[0], command.QUICK_ROWS, command.QUICK) == []
    assert missing(cases()[0], command.QUICK_ROWS, Plan()) == list(command.QUICK_ROWS)


def test_the_page_gets_tables_with_commit_and_seeds(run: Path) -> None:
    page = (run / "page.md").read_text()
    assert page.startswith("before\n<!-- measured: begin -->")
    assert page.endswith("<!-- measured: end -->\nafter\n")
    assert "old" not in page
    first = records(run)[0]
    assert f"Commit {first['commit']}; seeds {cases()[0].seed}, {cases()[22].seed}" in page
    for row in command.QUICK_ROWS:
        assert page.count(f"| {row} |") == 3


def test_what_rows_made_of_a_clip_is_seen_below_its_source(run: Path, tmp_path: Path) -> None:
    command.main(
        run, command.QUICK, rows=command.QUICK_ROWS, clips=(0,), sheet=tmp_path / "rows.webp"
    )
    sheet = np.asarray(Image.open(tmp_path / "rows.webp")) / 255
    strips = np.split(sheet[:, -WIDTH:, :3], np.arange(1, 5) * (len(sheet) + BETWEEN) // 5)
    height = len(strips[-1])
    source, truth, floor, *_ = (strip[:height] for strip in strips)
    # the round trip is near the truth, from which the source's ring has another colour
    assert np.square(floor - truth).mean() < 0.2 * np.square(source - truth).mean()
    assert sheet[:, :-WIDTH, 3].any()  # names, on a transparent background


def test_rows_without_pictures_are_told(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"SDEdit\.png; edit this clip first"):
        command.main(run, rows=("SDEdit",), clips=(0,), sheet=tmp_path / "rows.webp")
