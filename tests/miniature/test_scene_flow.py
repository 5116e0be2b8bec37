import pytest
import torch

from tokenflow.metrics import warp_error
from tokenflow.miniature.edits import SceneFlow
from tokenflow.miniature.scenes import random_scene
from tokenflow.propagation import DIS
from tokenflow.video import Clip

SCENE = random_scene(7, frames=9)
CLIP = Clip.from_frames(SCENE.render())


@pytest.mark.parametrize(("start", "end"), [(0, 1), (1, 0), (0, 8)])
def test_the_exact_flow_leads_to_the_same_colours(start: int, end: int) -> None:
    flow = SceneFlow(SCENE).between(CLIP, start, end)
    visible, frames = SCENE.visible(start, end), CLIP.frames[[start, end]]
    error = warp_error(frames, flow[None], visible[None])
    assert error < 0.002
    assert error < 0.2 * warp_error(frames, torch.zeros_like(flow)[None], visible[None])


def test_dis_agrees_where_the_scene_stays_visible() -> None:
    exact, found = (flow.between(CLIP, 2, 4) for flow in (SceneFlow(SCENE), DIS()))
    error = (exact - found).norm(dim=0)[SCENE.visible(2, 4)]
    # pixels; the object's outline and plain areas are DIS's own limits
    assert error.median() < 0.25
    assert error.mean() < 0.5
