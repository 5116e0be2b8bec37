"""Shells say what their functions say: on one process, and on two that see a part each."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor
from torchmetrics import Metric

from tests.metrics.making import noise, write_random_alexnet
from tests.on_ranks import on_ranks
from tokenflow.metrics import (
    LPIPS,
    SSIM,
    Flicker,
    FrameConsistency,
    JudgeAccuracy,
    Measures,
    Preservation,
    Structure,
    TextAlignment,
    WarpError,
    flicker,
    frame_consistency,
    load_lpips,
    lpips,
    preservation,
    shown,
    ssim,
    structure,
    text_alignment,
    warp_error,
)
from tokenflow.miniature.judge import Judge
from tokenflow.miniature.scenes import Attributes
from tokenflow.video import Clip

A, B = noise(5, 3, 16, 20), noise(5, 3, 16, 20, seed=1)
LARGE, OTHER = noise(5, 3, 35, 40), noise(5, 3, 35, 40, seed=1)
FLOW, MASK = 4 * noise(4, 2, 16, 20, seed=2) - 2, noise(5, 16, 20, seed=3) > 0.4
SPOTS = noise(5, 16, 20, seed=3) > 0.98  # with the pixels beside them not all of a frame
VECTORS = torch.nn.functional.normalize(noise(5, 8) - 0.5)
TARGET, JUDGE = Attributes.parse("a plain blue ball on sand"), Judge.load()
EXTRA = find_spec("torchvision") is not None
PARTS = [slice(0, 2), slice(2, 5)]
PAIRS = [slice(0, 2), slice(2, 4)]


@cache
def network() -> torch.nn.Module:
    with TemporaryDirectory() as folder:
        return load_lpips(str(write_random_alexnet(Path(folder))))


def shells() -> dict[str, tuple[Metric, list[tuple[Any, ...]]]]:
    """Each metric, and what it is told in two parts of unequal size."""
    around = [slice(pair.start, pair.stop + 1) for pair in PAIRS]
    return {
        "warp_error": (
            WarpError(),
            [(A[f], FLOW[p], MASK[p]) for f, p in zip(around, PAIRS, strict=True)],
        ),
        "ssim": (SSIM(), [(A[p], B[p]) for p in PARTS]),
        "structure": (Structure(), [(A[p], B[p], SPOTS[p]) for p in PARTS]),
        "preservation": (Preservation(), [(A[p], B[p], MASK[p]) for p in PARTS]),
        "text_alignment": (TextAlignment(), [(VECTORS[p], VECTORS[0]) for p in PARTS]),
        "frame_consistency": (FrameConsistency(), [(VECTORS[f],) for f in around]),
        "judge": (JudgeAccuracy(JUDGE), [(A[p], TARGET, ["shape"]) for p in PARTS]),
        "flicker": (Flicker(), [(A,), (A,)]),
    } | ({"lpips": (LPIPS(network()), [(LARGE[p], OTHER[p]) for p in PARTS])} if EXTRA else {})


EXPECTED = {
    "warp_error": warp_error(A, FLOW, MASK[:4]),
    "ssim": float(ssim(A, B).mean()),
    "structure": float(structure(A, B, SPOTS).mean()),
    "preservation": preservation(A, B, MASK),
    "text_alignment": float(text_alignment(VECTORS, VECTORS[0]).mean()),
    "frame_consistency": float(frame_consistency(VECTORS).mean()),
    "judge": float(shown(JUDGE, A, TARGET, ["shape"]).float().mean()),
    "flicker": flicker(A),
}
if EXTRA:
    EXPECTED["lpips"] = float(lpips(network(), LARGE, OTHER).mean())


def test_one_process() -> None:
    for name, (shell, parts) in shells().items():
        for part in parts:
            shell.update(*part)
        assert float(shell.compute()) == pytest.approx(EXPECTED[name], rel=1e-5), name
        shell.reset()
        shell.update(*parts[0])
        assert shell.compute().isfinite(), name


def of_this_rank() -> dict[str, Tensor]:
    found = {}
    for name, (shell, parts) in shells().items():
        shell.update(*parts[torch.distributed.get_rank()])
        found[name] = shell.compute()
    if torch.distributed.get_rank() == 0:  # as in a run, where the others measure nothing
        clip, measures = Clip.from_frames(A), Measures(distances=(1,))
        measures.of(clip, measures.motions(clip))
    return found


def test_two_processes(tmp_path: Path) -> None:
    for said in on_ranks(2, tmp_path / "ranks", of_this_rank):
        for name, value in said.items():
            assert float(value) == pytest.approx(EXPECTED[name], rel=1e-5), name
