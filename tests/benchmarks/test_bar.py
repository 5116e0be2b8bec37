"""The bar that passes in front of a scene."""

from __future__ import annotations

import pytest
import torch

from benchmarks.scenes.bar import BarScene
from tokenflow.metrics import warp_error
from tokenflow.miniature.scenes import Attributes, LayerPath, random_scene


def passing(frames: int = 3, step: float = 12.0) -> BarScene:
    """A bar of 20 pixels before a scene, on its way to the right."""
    base = random_scene(31, frames, Attributes("plain", "red", "ball", "grass"))
    one = torch.ones(frames)
    path = LayerPath(40 + step * torch.arange(frames), 64 * one, 10 * one, 0 * one)
    return BarScene(base.attributes, base.object, base.background, base.texture, base.phase, path)


def test_the_bar_covers_the_scene_and_nothing_else_changes() -> None:
    scene = passing()
    plain = random_scene(31, 3, scene.attributes)
    bar = scene.bar_mask(0)
    assert abs(float(bar.sum()) - 20 * 128) < 1
    assert torch.equal(scene.frame(0)[:, bar == 0], plain.frame(0)[:, bar == 0])
    assert (scene.frame(0) - plain.frame(0)).abs().mean(0)[bar == 1].min() > 0.02
    assert scene.mask(0)[bar == 1].max() == 0
    assert torch.equal(scene.mask(0)[bar == 0], plain.mask(0)[bar == 0])


def test_another_look_keeps_the_bar() -> None:
    scene = passing()
    other = scene.with_attributes(color="blue")
    assert isinstance(other, BarScene)
    bar = scene.bar_mask(1) == 1
    assert torch.equal(other.frame(1)[:, bar], scene.frame(1)[:, bar])
    assert not torch.equal(other.frame(1), scene.frame(1))


@pytest.mark.parametrize(("start", "end"), [(0, 1), (2, 0)])
def test_what_stays_visible_keeps_its_colour_along_the_flow(start: int, end: int) -> None:
    scene = passing()
    flow, visible = scene.flow(start, end), scene.visible(start, end)
    frames = torch.stack([scene.frame(start), scene.frame(end)])
    # what is left is bilinear sampling of an 8-pixel noise: 40 dB and better
    assert warp_error(frames, flow[None], visible[None]) < 1e-4
    on_bar = visible & (scene.bar_mask(start) == 1)
    torch.testing.assert_close(
        flow[0, on_bar], torch.full_like(flow[0, on_bar], 12.0 * (end - start)), atol=1e-4, rtol=0
    )


def test_the_bar_hides_what_it_passes_over() -> None:
    scene = passing()
    covered = (scene.bar_mask(0) == 0) & (scene.bar_mask(1) == 1)
    slow = scene.flow(0, 1).norm(dim=0) < 1
    assert (covered & slow).sum() > 100
    assert not scene.visible(0, 1)[covered & slow].any()
