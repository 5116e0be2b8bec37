from typing import Any

import pytest
import torch
from torch.nn.functional import interpolate

from tokenflow.errors import InputError
from tokenflow.propagation import DIS
from tokenflow.video import Clip


def translating(shift: tuple[int, int], size: int = 96) -> Clip:
    """Two views of one smooth texture: what the first shows at p, the second shows at p + shift."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(1, 3, 16, 16, generator=generator)
    x, y = shift
    texture = interpolate(noise, (size + 32, size + 32), mode="bicubic")[0].clamp(0, 1)
    views = [
        texture[:, 16 - v : 16 - v + size, 16 - u : 16 - u + size] for u, v in ((0, 0), (x, y))
    ]
    return Clip.from_frames(torch.stack(views))


@pytest.mark.parametrize("preset", ["ultrafast", "fast", "medium"])
@pytest.mark.parametrize("shift", [(0, 0), (5, -3), (-8, 6)])
def test_dis_finds_a_translation(preset: Any, shift: tuple[int, int]) -> None:
    flow = DIS(preset).between(translating(shift), 0, 1)
    assert flow.shape == (2, 96, 96)
    assert flow.dtype == torch.float32
    error = (flow - torch.tensor(shift)[:, None, None]).norm(dim=0)[16:-16, 16:-16]
    # pixels, away from the border, beyond which part of the texture has left
    assert error.mean() < 0.2


def test_dis_goes_from_start_to_end() -> None:
    clip = translating((5, -3))
    back = DIS().between(clip, 1, 0)[:, 16:-16, 16:-16].mean(dim=(1, 2))
    assert torch.allclose(back, torch.tensor([-5.0, 3.0]), atol=0.1)


def test_dis_needs_twelve_pixels() -> None:
    DIS().prepare(Clip.from_frames(torch.rand(2, 3, 12, 12)))
    with pytest.raises(InputError, match=r"12x12 pixels or more, got 8x64; raise the resolution"):
        DIS().prepare(Clip.from_frames(torch.rand(2, 3, 8, 64)))


def test_dis_works_on_the_smallest_frames() -> None:
    flow = DIS().between(Clip.from_frames(torch.rand(2, 3, 12, 12)), 0, 1)
    assert flow.isfinite().all()


@pytest.mark.parametrize("preset", ["ultrafast", "fast", "medium"])
@pytest.mark.parametrize("size", [(12, 48), (30, 40), (48, 80)])
def test_small_frames(preset: Any, size: tuple[int, int]) -> None:
    """On which OpenCV's own finest levels crash."""
    frames = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    clip = Clip.from_frames(frames)
    assert DIS(preset).between(clip, 0, 1).isfinite().all()
