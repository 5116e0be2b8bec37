from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenflow_local import LocalField, LocalPnP

from tokenflow import NNField
from tokenflow.diffusion import invert
from tokenflow.engine import edit_latents
from tokenflow.errors import InputError
from tokenflow.propagation import Window
from tokenflow.testing import editor_checks, kernel_checks, tiny_backbone, tiny_clip
from tokenflow.video import write_image

CHECKS = [*editor_checks(LocalPnP()), *kernel_checks(LocalField(radius=0.25))]


@pytest.mark.parametrize("check", CHECKS)
def test_contract(check) -> None:
    check()


def mask(folder: Path, frames: int) -> str:
    """White in the right half."""
    image = torch.zeros(3, 16, 32)
    image[..., 16:] = 1
    for i in range(frames):
        write_image(folder / f"{i}.png", image)
    return str(folder)


@pytest.mark.parametrize("kind", ["box", "one image", "an image for each"])
def test_the_background_stays(tmp_path: Path, kind: str) -> None:
    frames = {"box": 0, "one image": 1, "an image for each": 3}[kind]
    region = {"mask": mask(tmp_path, frames)} if frames else {"box": (0.5, 0.0, 1.0, 1.0)}
    backbone, clip, editor = tiny_backbone(), tiny_clip(3), LocalPnP(**region)
    editor.prepare(backbone, clip)
    schedule, clean = backbone.schedule(2), backbone.encode(clip.frames)
    trajectory = invert(backbone, clean, "", schedule, steps=2)
    edited = edit_latents(backbone, trajectory, schedule, "a ball", editor, NNField())
    assert torch.equal(edited[..., :8], clean[..., :8])
    assert ((edited - clean)[..., 8:].abs() > 0.01).float().mean() > 0.9


def test_a_mask_of_another_length(tmp_path: Path) -> None:
    editor = LocalPnP(mask=mask(tmp_path, 2))
    with pytest.raises(InputError, match="has 2 frames and the clip 3; give one image"):
        editor.prepare(tiny_backbone(), tiny_clip(3))


def test_masks_that_would_do_harm(tmp_path: Path) -> None:
    see_through = Image.new("RGBA", (32, 16), (255, 255, 255, 128))
    for image, said in ((see_through, "alpha"), (Image.new("L", (32, 64), 255), "aspect")):
        folder = tmp_path / said
        folder.mkdir()
        image.save(folder / "0.png")
        with pytest.raises(InputError, match=said):
            LocalPnP(mask=str(folder)).prepare(tiny_backbone(), tiny_clip(3))


def test_a_region_of_no_pixel() -> None:
    with pytest.raises(InputError, match="the region is empty"):
        LocalPnP(box=(0.5, 0.5, 0.501, 0.501)).prepare(tiny_backbone(), tiny_clip(3))


@pytest.mark.parametrize("box", [(0.5, 0, 0.5, 1), (0, 0.6, 1, 0.5), (-0.1, 0, 1, 1), (0, 0, 2, 1)])
def test_a_box_that_is_none(box: tuple[float, float, float, float]) -> None:
    with pytest.raises(InputError, match="left < right and top < bottom"):
        LocalPnP(box=box)


def test_matches_stay_near_and_are_the_best_there() -> None:
    height, width, reach = 5, 8, 2
    tokens = torch.randn(2, height * width, 6, generator=torch.Generator().manual_seed(0))
    both = torch.tensor([[0, 0]]), torch.tensor([[1.0, 0.0]])
    window = Window((0,), (1,), *both, height, width)
    found = LocalField(reach / width).correspond(tokens[:1], tokens[1:], window).indices[0, :, 0]
    similarity = torch.nn.functional.normalize(tokens[0], dim=-1) @ (
        torch.nn.functional.normalize(tokens[1], dim=-1).T
    )
    for token, match in enumerate(found.tolist()):
        near = [
            other
            for other in range(height * width)
            if abs(other // width - token // width) <= reach
            and abs(other % width - token % width) <= reach
        ]
        assert match == max(near, key=lambda other: float(similarity[token, other]))


@pytest.mark.parametrize("radius", [0.0, 1.5])
def test_a_radius_out_of_range(radius: float) -> None:
    with pytest.raises(InputError, match="above 0 to 1"):
        LocalField(radius)
