"""Judge accuracy: whether an edited scene of the miniature shows what it should."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokenflow.metrics.warp_error import warp_error
from tokenflow.miniature.edits import SceneEdit
from tokenflow.miniature.judge import Judge, answers
from tokenflow.miniature.scenes import VOCABULARY, Attributes


def judge_accuracy(
    judge: Judge,
    frames: Float[Tensor, "frames 3 height width"],
    source: Attributes,
    target: Attributes,
) -> dict[str, Bool[Tensor, " frames"]]:
    """Which frames show what was to change ("edited"), and what was to stay ("kept"):

        for all attributes n of the kind: argmax_v J_n(v | frame) = target_n,

    J_n the judge's scores for the values v of attribute n; to change are those in which source and
    target differ. A kind without attributes is left out. The mean is a share, 0..1; chance is 1 of
    4 to 6 for an attribute. Blind to everything without a name (motion, place, consistency), and of
    use only for the scenes that the judge was trained on, at their size.
    Source: our own, as a classifier's accuracy on what was generated.
    """
    right, changed = answers(judge, frames, target), source.differing(target)
    kinds = {"edited": changed, "kept": [name for name in VOCABULARY if name not in changed]}
    return {
        kind: torch.stack([right[name] for name in names]).all(dim=0)
        for kind, names in kinds.items()
        if names
    }


@dataclass(frozen=True)
class Verdict:
    """An edited clip, judged: shares of frames, and the warp error by the source's true motion."""

    edited: float
    kept: float
    warp_error: float


def judge_edit(edit: SceneEdit, frames: Float[Tensor, "frames 3 128 128"], judge: Judge) -> Verdict:
    """How well `frames` show an edit that changes some attributes and keeps some."""
    right = judge_accuracy(judge, frames, edit.scene.attributes, edit.target)
    shares = {kind: float(frame.float().mean()) for kind, frame in right.items()}
    return Verdict(**shares, warp_error=warp_error(frames, *edit.motion))
