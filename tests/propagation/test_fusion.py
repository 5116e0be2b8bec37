"""Fusion of predictions: what a frame takes of its keyframes, and where it does not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tokenflow.propagation import Motion, Window
from tokenflow.propagation.flow.base import smooth
from tokenflow.propagation.flow.rematch import LOST
from tokenflow.propagation.fusion import STRONGEST, details, elected, fuse

HEIGHT, WIDTH = 6, 8


def window(x: float = 0.0, y: float = 0.0) -> Window:
    """Frame 1 between the keyframes 0 and 3, whose pixels lie at (x, y) from the frame's."""
    return Window(
        frames=(1,),
        keyframes=(0, 3),
        neighbours=torch.tensor([[0, 1]]),
        blend=torch.tensor([[0.75, 0.25]]),
        height=HEIGHT,
        width=WIDTH,
        motion=Motion(
            torch.tensor([float(x), float(y)]).expand(1, 2, HEIGHT * WIDTH, 2),
            torch.zeros(1, 2, HEIGHT * WIDTH),
        ),
    )


def latents(frames: int) -> Tensor:
    return torch.rand(frames, 4, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(frames))


def fused(
    clean: Tensor, keys: Tensor, by: Window, strength: float, restored: float = 0.0
) -> Tensor:
    """With a source that is the same everywhere."""
    source, source_keys = torch.zeros_like(clean), torch.zeros_like(keys)
    return fuse(clean, keys, source, source_keys, by, strength, restored)


def test_a_strength_of_0_changes_nothing() -> None:
    clean = latents(1)
    assert torch.equal(fused(clean, latents(2), window(0.3, 1.2), 0.0), clean)


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_a_frame_takes_its_share_of_both_keyframes_along_the_motion(strength: float) -> None:
    clean, keys = latents(1), latents(2)
    found = fused(clean, keys, window(x=2, y=-1), strength)
    both = 0.75 * keys[0] + 0.25 * keys[1]
    moved = (1 - strength) * clean[0, :, 1:, :-2] + strength * both[:, :-1, 2:]
    torch.testing.assert_close(found[0, :, 1:, :-2], moved)
    # what comes from outside of the keyframes is the frame's own
    torch.testing.assert_close(found[0, :, :1], clean[0, :, :1])
    torch.testing.assert_close(found[0, :, :, -2:], clean[0, :, :, -2:])


def test_between_pixels_values_are_bicubic() -> None:
    """Bilinear ones of a parabola would lie 1/4 too high."""
    parabola = (torch.arange(WIDTH, dtype=torch.float32) ** 2).expand(2, 1, HEIGHT, WIDTH)
    found = fused(torch.zeros(1, 1, HEIGHT, WIDTH), parabola, window(x=0.5), 1.0)
    halfway = (torch.arange(WIDTH) + 0.5) ** 2
    # with a = -0.75, as PyTorch has it, 1/8 too low
    torch.testing.assert_close(found[0, 0, :, 1:-2], halfway[1:-2].expand(HEIGHT, -1) - 0.125)


def test_where_the_source_differs_the_frame_keeps_its_own() -> None:
    clean, keys, source = latents(1), latents(2), torch.zeros(1, 4, HEIGHT, WIDTH)
    keyframe = source.clone()
    keyframe[..., WIDTH // 2 :] = 0.5**0.5  # whose square is the trust's scale
    keyframe[..., WIDTH - 1 :] = 3.0
    found = fuse(clean, keys, source, torch.cat([source, keyframe]), window(), 1.0)
    share = 0.25 * torch.exp(torch.tensor(-1.0))
    torch.testing.assert_close(found[0, ..., 0], 0.75 * keys[0, ..., 0] + 0.25 * keys[1, ..., 0])
    beside = WIDTH // 2 + 1  # the difference is a mean over 3 × 3 pixels
    torch.testing.assert_close(
        found[0, ..., beside],
        0.75 * keys[0, ..., beside]
        + share * keys[1, ..., beside]
        + (0.25 - share) * clean[0, ..., beside],
    )
    alone = 0.75 * keys[0, ..., -1] + 0.25 * clean[0, ..., -1]
    torch.testing.assert_close(found[0, ..., -1], alone)


def test_what_is_hidden_in_one_keyframe_comes_from_the_other() -> None:
    clean, keys, by = latents(1), latents(2), window()
    assert by.motion is not None
    lost = by.motion.inconsistency.unflatten(2, (HEIGHT, WIDTH))
    lost[0, 0, :, 2:4] = lost[0, 1, :, 4:6] = LOST + 0.1
    lost[0, :, :, 6:] = LOST + 0.1
    found = fused(clean, keys, by, 0.8)
    takes = (0.75 * keys[0] + 0.25 * keys[1]).clone()
    takes[..., 2:4], takes[..., 4:6] = keys[1, ..., 2:4], keys[0, ..., 4:6]
    torch.testing.assert_close(found[0, ..., :6], (0.2 * clean[0] + 0.8 * takes)[..., :6])
    torch.testing.assert_close(found[0, ..., 6:], clean[0, ..., 6:])  # in both


def test_what_lies_outside_of_one_keyframe_comes_from_the_other() -> None:
    clean, keys, by = latents(1), latents(2), window()
    assert by.motion is not None
    displacement = by.motion.displacement.clone()
    displacement[:, 0, :, 0] = 2.0
    by = replace(by, motion=Motion(displacement, by.motion.inconsistency))
    found = fused(clean, keys, by, 0.8)[0, ..., -2:]
    torch.testing.assert_close(found, (0.2 * clean[0] + 0.8 * keys[1])[..., -2:])


def test_a_keyframe_without_a_leader_keeps_its_own() -> None:
    clean, keys, by = latents(1), latents(2), replace(window(), blend=torch.zeros(1, 2))
    assert torch.equal(fused(clean, keys, by, 1.0), clean)


def test_a_window_without_motion() -> None:
    bare = Window((1,), (0,), torch.tensor([[0, 0]]), torch.tensor([[1.0, 0.0]]))
    with pytest.raises(ValueError, match="fusion needs a window with motion"):
        fused(latents(1), latents(1), bare, 0.5)


def power(values: Tensor) -> Tensor:
    return details(values).square().mean(dim=(2, 3), keepdim=True)


@pytest.mark.parametrize("restored", [0.5, 1.0])
@pytest.mark.parametrize("strength", [0.4, 1.0])
def test_details_get_a_share_of_their_strength_back(strength: float, restored: float) -> None:
    clean, keys = latents(1) - 0.5, latents(2) - 0.5
    mean = fused(clean, keys, window(), strength)
    wanted = (1 - strength) * power(clean)
    wanted += strength * (0.75 * power(keys[:1]) + 0.25 * power(keys[1:]))
    gain = (wanted / power(mean)).pow(restored / 2).clamp(1, STRONGEST)
    assert gain.min() > 1
    found = fused(clean, keys, window(), strength, restored)
    torch.testing.assert_close(found, smooth(mean) + gain * details(mean))


@pytest.mark.parametrize(("strength", "x"), [(0.0, 0.3), (1.0, 2.0 * WIDTH)])
def test_a_frame_that_takes_nothing_is_left_as_it_is(strength: float, x: float) -> None:
    clean, keys = latents(1), 9 * latents(2)
    torch.testing.assert_close(fused(clean, keys, window(x), strength, 1.0), clean)


def test_where_keyframes_agree_with_the_frame_nothing_changes() -> None:
    clean = latents(1)
    keys = clean.repeat(2, 1, 1, 1)
    torch.testing.assert_close(fused(clean, keys, window(), 0.8, 1.0), clean)


def test_where_there_are_no_details_none_are_made() -> None:
    flat = torch.full((2, 4, HEIGHT, WIDTH), 0.3)
    torch.testing.assert_close(fused(flat[:1], flat, window(), 0.5, 1.0), flat[:1])


STILL = torch.zeros(4, 2, HEIGHT, WIDTH)


def vote(keys: Tensor, own: int, source: Tensor | None = None, flows: Tensor = STILL) -> Tensor:
    return elected(keys, torch.zeros_like(keys) if source is None else source, flows, own)


@pytest.mark.parametrize("own", range(4))
def test_what_one_keyframe_alone_shows_is_voted_out(own: int) -> None:
    """And nothing else changes, where the three others agree."""
    keys = latents(1).expand(4, -1, -1, -1).clone()
    keys[2, :, 2:5, 3:6] += 3
    torch.testing.assert_close(vote(keys, own), keys[0])


def test_a_pixel_takes_what_differs_least_from_the_others() -> None:
    """And no mean; far from the border between two of them, as neighbours vote alike."""
    keys = torch.zeros(3, 1, HEIGHT, WIDTH)
    keys[:, 0, :, : WIDTH // 2] = torch.tensor([1.0, 1.2, 5.0])[:, None, None]
    keys[:, 0, :, WIDTH // 2 :] = torch.tensor([9.0, 3.3, 3.1])[:, None, None]
    for own in range(3):
        found = vote(keys, own, flows=STILL[:3])[0]
        assert (found[:, : WIDTH // 2 - 1] - 1.2).abs().max() < 1e-5
        assert (found[:, WIDTH // 2 + 1 :] - 3.3).abs().max() < 1e-5


def test_of_two_groups_all_prefer_the_same() -> None:
    one, other = latents(2)
    noise = 1e-3 * latents(4)
    keys = torch.stack([other, one, other, one]) + noise
    for own in range(4):
        assert (vote(keys, own) - other).abs().max() < 2e-3


def test_two_have_no_majority() -> None:
    keys, source = latents(3), torch.zeros(3, 4, HEIGHT, WIDTH)
    source[2] = 2
    for own in range(3):
        torch.testing.assert_close(vote(keys, own, source, STILL[:3]), keys[own])


def test_keyframes_are_moved_to_the_one_that_votes() -> None:
    key = latents(1)[0]
    keys = torch.stack([key.roll(k, dims=2) for k in range(4)])
    keys[1] += 3
    flows = torch.stack(
        [torch.tensor([k - 1.0, 0.0])[:, None, None].expand(-1, 6, 8) for k in range(4)]
    )
    found = vote(keys, 1, flows=flows)
    # but for pixels that are in too few of the keyframes
    torch.testing.assert_close(found[:, :, 1:-2], key.roll(1, dims=2)[:, :, 1:-2])


def test_who_shows_something_else_of_the_source_has_no_vote() -> None:
    keys, source = latents(4), torch.zeros(4, 4, HEIGHT, WIDTH)
    keys[1:] = keys[1]
    source[1:] = 2  # three that agree, of another place
    torch.testing.assert_close(vote(keys, 0, source), keys[0], rtol=0, atol=1e-5)
    assert (vote(keys, 0) - keys[1]).abs().max() < 1e-5
