import torch

from tokenflow.metrics import judge_accuracy
from tokenflow.miniature.judge import Judge
from tokenflow.miniature.scenes import Attributes, random_scene

BLUE = Attributes.parse("a plain blue ball on sand")
RED = Attributes.parse("a striped red ball on sand")


def test_true_edits_are_right_and_sources_are_not() -> None:
    judge, scene = Judge.load(), random_scene(3_000_005, 3, BLUE)
    source, truth = scene.render(), scene.with_attributes(pattern="striped", color="red").render()
    # one right of two is not enough
    halfway = scene.with_attributes(color="red").render()
    found = judge_accuracy(judge, torch.cat([truth, source, halfway]), BLUE, RED)
    assert found["edited"].tolist() == 3 * [True] + 6 * [False]
    assert found["kept"].all()
    other = judge_accuracy(judge, truth, RED, Attributes.parse("a striped blue ball on sand"))
    assert not other["edited"].any()
    assert other["kept"].all()


def test_a_kind_without_attributes_is_left_out() -> None:
    judge, scene = Judge.load(), random_scene(3_000_005, 1, BLUE)
    everything = Attributes.parse("a dotted white star on night")
    assert list(judge_accuracy(judge, scene.render(), BLUE, BLUE)) == ["kept"]
    assert list(judge_accuracy(judge, scene.render(), BLUE, everything)) == ["edited"]
