"""The plain transcription of the method, which benchmarks compare with, is the method."""

from __future__ import annotations

import pytest
import transcription
from operations import KINDS, executed, needed
from speed import Case, check

from tokenflow.diffusion import Backbone
from tokenflow.editors import Prompts
from tokenflow.engine import SourceCache
from tokenflow.testing import tiny_backbone, tiny_clip

PROMPTS = Prompts("a blue ball on sand", "a green cube", "a red ball on sand")


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny_backbone()


@pytest.fixture(scope="module")
def case(backbone: Backbone) -> Case:
    return Case.of(backbone, tiny_clip(5), PROMPTS, steps=2, every=2)


def test_the_transcription_edits_as_the_engine_does(backbone: Backbone, case: Case) -> None:
    processors = dict(backbone.unet.attn_processors)
    check(case, backbone)
    assert (case.transcribed(backbone) - case.trajectory.clean).abs().max() > 0.5
    assert backbone.unet.attn_processors == processors


def test_a_difference_is_told(
    backbone: Backbone, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    attend = transcription.attend
    monkeypatch.setattr(transcription, "attend", lambda *qkv: attend(*qkv) * 1.01)
    with pytest.raises(SystemExit, match="differ"):
        check(case, backbone)


def test_little_more_is_computed_than_the_method_needs(backbone: Backbone) -> None:
    case = Case.of(backbone, tiny_clip(3), PROMPTS, steps=2, every=2)
    unet, plan, cache = backbone.unet, case.plan(backbone), SourceCache()
    plain = executed(unet, lambda: case.transcribed(backbone))
    for second in (False, True):
        least = needed(unet, plan, second)
        ours = executed(unet, lambda: case.ours(backbone, cache))
        assert all(least[kind] <= ours[kind] <= plain[kind] for kind in KINDS)
        assert ours["matching"] == least["matching"] < plain["matching"]
        assert ours.total() <= 1.1 * least.total()
