"""The plain transcription of the method, which benchmarks compare with, is the method."""

from __future__ import annotations

from speed import AGREEMENT, Case

from tokenflow.editors import Prompts
from tokenflow.testing import tiny_backbone, tiny_clip

PROMPTS = Prompts("a blue ball on sand", "a green cube", "a red ball on sand")


def test_the_transcription_edits_as_the_engine_does() -> None:
    backbone = tiny_backbone()
    case = Case.of(backbone, tiny_clip(9), PROMPTS, steps=4, every=2)
    processors = dict(backbone.unet.attn_processors)
    ours, plain = case.ours(backbone), case.transcribed(backbone)
    assert (ours - case.trajectory.clean).abs().max() > 0.5
    assert (ours - plain).abs().max() <= AGREEMENT
    assert backbone.unet.attn_processors == processors
