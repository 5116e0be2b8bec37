import pytest
import torch
from torch.nn.functional import grid_sample

from tokenflow.miniature.scenes import (
    SIZE,
    VOCABULARY,
    Attributes,
    LayerPath,
    Scene,
    pixel_grid,
    random_scene,
)


def test_captions_are_read_back() -> None:
    every = Attributes.every()
    assert len(set(map(str, every))) == 4 * 6 * 4 * 6
    assert [Attributes.parse(str(a)) for a in every] == every


@pytest.mark.parametrize("caption", ["", "a ball", "a plain red ball in grass"])
def test_bad_captions_say_what_was_expected(caption: str) -> None:
    with pytest.raises(ValueError, match="PATTERN COLOR SHAPE on BACKGROUND"):
        Attributes.parse(caption)


def test_unknown_words_name_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"color must be one of .*'red'.*got 'beige'"):
        Attributes("plain", "beige", "ball", "grass")


def test_attributes_that_differ_are_named() -> None:
    first, second = map(
        Attributes.parse, ("a plain blue ball on sand", "a dotted red ball on sand")
    )
    assert first.differing(second) == ("pattern", "color")
    assert first.differing(first) == ()


def test_everything_comes_from_the_seed() -> None:
    first, again, other = (random_scene(seed, frames=2).render() for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (2, 3, SIZE, SIZE)
    assert first.min() >= 0
    assert first.max() <= 1


@pytest.mark.parametrize("name", VOCABULARY)
def test_each_attribute_changes_the_picture_where_it_should(name: str) -> None:
    scene = random_scene(7, attributes=Attributes("plain", "red", "ball", "grass"))
    changed = scene.with_attributes(**{name: VOCABULARY[name][1]})
    difference = (scene.frame(0) - changed.frame(0)).abs().amax(dim=0)
    inside = scene.mask(0) > 0.99
    if name == "background":
        assert difference[inside].max() == 0
        assert difference[scene.mask(0) == 0].mean() > 0.1
    elif name != "shape":
        assert difference[~inside & (scene.mask(0) == 0)].max() == 0
        assert difference[inside].mean() > 0.1
    else:
        assert difference.max() > 0.3


def test_flow_of_a_pure_translation_is_the_translation() -> None:
    def moving(x: float, y: float) -> LayerPath:
        one = torch.ones(2)
        across, down = torch.tensor([64.0, 64 + x]), torch.tensor([60.0, 60 + y])
        return LayerPath(across, down, 30 * one, 0.4 * one)

    scene = Scene(Attributes("plain", "red", "box", "sand"), moving(5, -2), moving(-3, 1), 1, 0.0)
    flow, mask = scene.flow(0, 1), scene.mask(0)
    # float32 rounding of positions up to 128: 1e-4 is a hundred units in the last place
    torch.testing.assert_close(
        flow[:, mask > 0.5].mean(1), torch.tensor([5.0, -2.0]), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(
        flow[:, mask < 0.5].mean(1), torch.tensor([-3.0, 1.0]), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("seed", [11, 12, 13, 14])
@pytest.mark.parametrize("background", ["grass", "sand", "snow"])
def test_frames_warped_by_the_exact_flow_agree_where_visible(seed: int, background: str) -> None:
    attributes = Attributes("plain", "purple", "star", background)
    scene = random_scene(seed, frames=12, attributes=attributes)
    for start, end in ((0, 1), (0, 11), (8, 3)):
        there = pixel_grid(SIZE) + scene.flow(start, end)
        grid = (there / (SIZE - 1) * 2 - 1).permute(1, 2, 0)[None]
        warped = grid_sample(scene.frame(end)[None], grid, align_corners=True)[0]
        visible = scene.visible(start, end)
        error = (warped - scene.frame(start)).square().mean(dim=0)
        assert visible.float().mean() > 0.3
        # what is left is bilinear sampling of an 8-pixel noise: 40 dB and better
        assert error[visible].mean() < 1e-4
        # and the flow says something: without it the error is many times that
        assert (scene.frame(end) - scene.frame(start))[:, visible].square().mean() > 5e-4


def test_the_object_hides_what_it_passes_over() -> None:
    scene = random_scene(21, frames=16, attributes=Attributes("plain", "red", "ball", "brick"))
    covered = (scene.mask(0) < 0.02) & (scene.mask(15) > 0.98)
    still = scene.flow(0, 15).norm(dim=0) < 1
    assert not scene.visible(0, 15)[covered & still].any()


def test_points_come_back_through_a_path() -> None:
    path = random_scene(5, frames=3).object
    points = torch.rand(2, 10) * SIZE
    # float32 over a division and a product by the scale
    torch.testing.assert_close(
        path.to_pixels(1, path.to_layer(1, points)), points, atol=1e-4, rtol=0
    )
