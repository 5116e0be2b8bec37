import pytest
import torch

from tests.metrics.making import translation
from tokenflow.errors import InputError
from tokenflow.metrics import visible, visible_flow
from tokenflow.miniature.edits import SceneFlow
from tokenflow.miniature.scenes import random_scene
from tokenflow.propagation import DIS, ClipFlow
from tokenflow.video import Clip


def constant(x: float, y: float = 0.0) -> torch.Tensor:
    return torch.tensor([x, y])[:, None, None].expand(2, 8, 10)


def test_what_leaves_the_frame_is_not_visible() -> None:
    seen = visible(constant(-2), constant(2))
    assert not seen[:, :2].any()
    assert seen[:, 2:].all()


@pytest.mark.parametrize(("length", "missed", "seen"), [
    (0.0, 0.70, True), (0.0, 0.72, False),  # 0.5 squared pixels of nothing
    (4.0, 0.86, True), (4.0, 0.88, False),  # 0.01 (4² + 3.13²) + 0.5 = 0.87²
])  # fmt: skip
def test_the_constants_of_the_check(length: float, missed: float, seen: bool) -> None:
    middle = visible(constant(length), constant(missed - length))[4, 4]
    assert bool(middle) is seen


def test_exact_flow_finds_what_the_scene_hides() -> None:
    scene = random_scene(3, 9)
    flow, seen = visible_flow(ClipFlow(Clip.from_frames(scene.render()), SceneFlow(scene)))(0, 8)
    truth = scene.visible(0, 8)
    assert torch.equal(flow, scene.flow(0, 8))
    # the scene's own mask also leaves out the outline's pixels, which mix two layers
    assert (seen & truth).sum() / truth.sum() > 0.99
    assert (seen & ~truth).sum() / seen.sum() < 0.05


def test_a_clip_that_is_too_small_is_refused() -> None:
    with pytest.raises(InputError, match="12x12"):
        ClipFlow(Clip.from_frames(translation(2, 8, 8)), DIS())
