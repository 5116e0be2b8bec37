"""The plain transcription of the method, which benchmarks compare with, is the method."""

from __future__ import annotations

import pytest
from operations import KINDS, executed, needed
from speed import AGREEMENT, TIE, Case, Recorded, ties_as

from tokenflow.diffusion import Backbone
from tokenflow.editors import Prompts
from tokenflow.testing import tiny_backbone, tiny_clip


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny_backbone()


@pytest.fixture(scope="module")
def case(backbone: Backbone) -> Case:
    prompts = Prompts("a blue ball on sand", "a green cube", "a red ball on sand")
    return Case.of(backbone, tiny_clip(5), prompts, steps=2, every=2)


def test_the_transcription_edits_as_the_engine_does(backbone: Backbone, case: Case) -> None:
    processors, recorded = dict(backbone.unet.attn_processors), Recorded()
    ours = case.ours(backbone, recorded)
    with ties_as(recorded, case) as ties:
        plain = case.transcribed(backbone)
    assert (ours - case.trajectory.clean).abs().max() > 0.5
    assert (ours - plain).abs().max() <= AGREEMENT
    assert ties.difference <= TIE
    assert backbone.unet.attn_processors == processors


def test_no_more_is_computed_than_the_method_needs(backbone: Backbone, case: Case) -> None:
    unet, plan = backbone.unet, case.plan(backbone)
    least = needed(unet, plan)
    ours = executed(unet, lambda: case.ours(backbone))
    plain = executed(unet, lambda: case.transcribed(backbone))
    assert all(least[kind] <= ours[kind] <= plain[kind] for kind in KINDS)
    assert ours["matching"] == least["matching"] < plain["matching"]
    assert ours.total() <= 1.1 * least.total()
    assert needed(unet, plan, second=True).total() < 0.8 * least.total()
