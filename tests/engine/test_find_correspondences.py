"""Correspondences without an edit, by the names that the package exports."""

import pytest
import torch

import tokenflow
from tokenflow import FlowWeighted, NNField, Settings, draw_correspondences, find_correspondences
from tokenflow.errors import InputError
from tokenflow.testing import tiny_backbone
from tokenflow.video import Clip

SETTINGS = Settings(steps=3, keyframe_every=2, batch=2)


def test_every_name_is_importable() -> None:
    for name in tokenflow.__all__:
        assert getattr(tokenflow, name).__name__ == name


def test_a_frame_that_is_a_keyframes_copy_is_found_in_place() -> None:
    image = torch.rand(3, 16, 32, generator=torch.Generator().manual_seed(0))
    clip = Clip.from_frames(image.expand(4, -1, -1, -1).clone())
    model = tiny_backbone()
    seen = find_correspondences(model, clip, NNField(), "a ball", SETTINGS, step=1)
    assert (seen.step, seen.steps, seen.frames) == (1, 3, [0, 1, 2, 3])
    assert seen.site in model.sites()
    tokens = seen.tokens.shape[1] * seen.tokens.shape[2]
    for _, found in seen.parts:
        places = found.indices % tokens
        assert (places == torch.arange(tokens)[None, :, None]).all()


@pytest.mark.parametrize("kernel", [NNField(), FlowWeighted()])
def test_it_is_drawn(kernel: NNField | FlowWeighted) -> None:
    clip = Clip.from_frames(torch.rand(5, 3, 16, 32, generator=torch.Generator().manual_seed(1)))
    seen = find_correspondences(tiny_backbone(), clip, kernel, "a ball", SETTINGS, frame=3)
    sheet = draw_correspondences(seen, clip.frames, 3)
    assert sheet.shape[0] == 3
    assert 0 <= float(sheet.min()) < float(sheet.max()) <= 1


def test_a_site_that_is_not_there() -> None:
    clip = Clip.from_frames(torch.rand(2, 3, 16, 32))
    with pytest.raises(InputError, match="expected one of"):
        find_correspondences(tiny_backbone(), clip, NNField(), "a ball", SETTINGS, site="nowhere")
