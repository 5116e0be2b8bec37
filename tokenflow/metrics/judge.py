"""Judge accuracy: whether an edited scene of the miniature shows what it should."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokenflow.metrics.average import Average
from tokenflow.miniature.judge import Judge, answers
from tokenflow.miniature.scenes import VOCABULARY, Attributes


def shown(
    judge: Judge,
    frames: Float[Tensor, "frames 3 height width"],
    target: Attributes,
    names: Iterable[str] = tuple(VOCABULARY),
) -> Bool[Tensor, " frames"]:
    """Whether in each frame all of the named attributes are judged to be the target's:

        for all names n: argmax_v J_n(v | frame) = target_n,

    J_n the judge's scores for the values v of attribute n. The mean is a share, 0..1; ask for the
    attributes that were to change and for the others apart. Chance is 1 of 4 to 6 for an attribute.
    Blind to everything without a name (motion, place, consistency), and of use only for the scenes
    that the judge was trained on, at their size.
    Source: our own, as a classifier's accuracy on what was generated.
    """
    right = answers(judge, frames, target)
    return torch.stack([right[name] for name in names]).all(dim=0)


def changed(source: Attributes, target: Attributes) -> tuple[str, ...]:
    """The names of the attributes in which two differ."""
    return tuple(name for name in VOCABULARY if getattr(source, name) != getattr(target, name))


class JudgeAccuracy(Average):
    """Mean over frames of `shown`."""

    def __init__(self, judge: Judge) -> None:
        super().__init__()
        self.judge = judge

    def update(
        self,
        frames: Float[Tensor, "frames 3 height width"],
        target: Attributes,
        names: Iterable[str] = tuple(VOCABULARY),
    ) -> None:
        self.add(shown(self.judge, frames, target, names))
