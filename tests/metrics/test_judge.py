import torch

from tokenflow.metrics import shown
from tokenflow.metrics.judge import changed
from tokenflow.miniature.judge import Judge
from tokenflow.miniature.scenes import Attributes, random_scene

BLUE = Attributes.parse("a plain blue ball on sand")
RED = Attributes.parse("a striped red ball on sand")


def test_true_edits_are_right_and_sources_are_not() -> None:
    judge, scene = Judge.load(), random_scene(3_000_005, 3, BLUE)
    source, truth = scene.render(), scene.with_attributes(pattern="striped", color="red").render()
    assert changed(BLUE, RED) == ("pattern", "color")
    assert shown(judge, truth, RED).all()
    assert not shown(judge, source, RED, changed(BLUE, RED)).any()
    assert shown(judge, source, RED, ("shape", "background")).all()
    # one right of two is not enough
    halfway = scene.with_attributes(color="red").render()
    assert shown(judge, halfway, RED, ["color"]).all()
    assert not shown(judge, halfway, RED, changed(BLUE, RED)).any()
    both = torch.cat([truth, source])
    assert float(shown(judge, both, RED).float().mean()) == 0.5
