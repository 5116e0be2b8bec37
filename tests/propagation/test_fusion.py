"""Fusion of predictions: what a frame takes of its keyframes, and where it does not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tokenflow.propagation import Motion, Window
from tokenflow.propagation.fusion import fuse

HEIGHT, WIDTH = 6, 8


def window(x: float = 0.0, y: float = 0.0, inconsistency: float = 0.0) -> Window:
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
            torch.full((1, 2, HEIGHT * WIDTH), inconsistency),
        ),
    )


def latents(frames: int) -> Tensor:
    return torch.rand(frames, 4, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(frames))


def test_a_strength_of_0_changes_nothing() -> None:
    clean = latents(1)
    assert torch.equal(fuse(clean, latents(2), window(0.3, 1.2), 0.0), clean)


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_a_frame_takes_its_share_of_both_keyframes_along_the_motion(strength: float) -> None:
    clean, keys = latents(1), latents(2)
    found = fuse(clean, keys, window(x=2, y=-1), strength)
    both = 0.75 * keys[0] + 0.25 * keys[1]
    moved = (1 - strength) * clean[0, :, 1:, :-2] + strength * both[:, :-1, 2:]
    torch.testing.assert_close(found[0, :, 1:, :-2], moved)
    # what comes from outside of the keyframes is the frame's own
    torch.testing.assert_close(found[0, :, :1], clean[0, :, :1])
    torch.testing.assert_close(found[0, :, :, -2:], clean[0, :, :, -2:])


def test_between_pixels_values_are_bilinear() -> None:
    ramp = torch.arange(WIDTH, dtype=torch.float32).expand(2, 1, HEIGHT, WIDTH)
    found = fuse(torch.zeros(1, 1, HEIGHT, WIDTH), ramp, window(x=0.25), 1.0)
    torch.testing.assert_close(found[0, 0, :, :-1], ramp[0, 0, :, :-1] + 0.25)


def test_where_flow_cannot_be_trusted_the_frame_keeps_its_own() -> None:
    clean, keys = latents(1), latents(2)
    torch.testing.assert_close(fuse(clean, keys, window(inconsistency=2.0), 1.0), clean)
    halfway = fuse(clean, keys, window(inconsistency=0.5), 1.0)
    share = torch.exp(torch.tensor(-1.0))
    torch.testing.assert_close(
        halfway[0], (1 - share) * clean[0] + share * (0.75 * keys[0] + 0.25 * keys[1])
    )


def test_a_window_without_motion() -> None:
    bare = Window((1,), (0,), torch.tensor([[0, 0]]), torch.tensor([[1.0, 0.0]]))
    with pytest.raises(ValueError, match="fusion needs a window with motion"):
        fuse(latents(1), latents(1), bare, 0.5)
