import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from tests.propagation.test_clip_flow import CLIP, SCALE, Panning
from tokenflow.miniature.edits import SceneFlow
from tokenflow.miniature.scenes import random_scene
from tokenflow.propagation import DIS, ClipFlow, LatentFlow
from tokenflow.video import Clip


@pytest.mark.parametrize("scale", [2, 5, 8, 16])
def test_latents_are_moved_as_their_frames(scale: int) -> None:
    """By about half a latent pixel in each frame; texture of the size of one."""
    side, shift = 16 * scale, scale // 2
    noise = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    texture = interpolate(noise, scale_factor=scale, mode="bicubic").clamp(0, 1)[0]
    frames = [texture[:, :, 4 * shift - i * shift :][:, :, :side] for i in range(4)]
    flow = LatentFlow(Clip.from_frames(torch.stack(frames)), scale)
    there, back = (one[:, 4:-4, 4:-4] for one in flow.between(0, 3))
    moved = 3 * shift / scale
    for found, expected in ((there, moved), (back, -moved)):
        assert (found[0] - expected).abs().mean() < 0.1
        assert found[1].abs().mean() < 0.1
    assert there.shape == (3, 8, 8)


def test_latents_flow_is_measured_between_neighbours_alone() -> None:
    provider, flow = Panning(), LatentFlow(CLIP, SCALE)
    flow.flow = provider
    whole = [flow.between(start, end) for start, end in ((1, 4), (4, 1), (0, 4), (2, 2))]
    assert sorted(provider.asked) == sorted(p for i in range(4) for p in ((i, i + 1), (i + 1, i)))
    # in any order
    other = LatentFlow(CLIP, SCALE)
    other.flow = Panning()
    for start, end in ((0, 4), (1, 3), (1, 4)):
        other.between(start, end)
    for one, again in zip(whole[0], other.between(1, 4), strict=True):
        assert torch.equal(one, again)


def test_latents_flow_is_nearer_to_the_truth_than_a_search_over_the_distance() -> None:
    scene = random_scene(5, 12, size=128)
    clip, pairs = Clip.from_frames(scene.render(128)), [(i, i + 8) for i in range(4)]

    def error(flow: ClipFlow) -> float:
        """Mean distance from the true flow, in latent pixels, of what is seen in both frames."""
        true = [ClipFlow(clip, SceneFlow(scene), 4).between(*pair)[0] for pair in pairs]
        found = [flow.between(*pair)[0] for pair in pairs]
        off = [(f - t)[:2].norm(dim=0)[t[2] < 0.25] for f, t in zip(found, true, strict=True)]
        return float(torch.cat(off).mean())

    assert error(LatentFlow(clip, 4)) < 0.5 * error(ClipFlow(clip, DIS(), 4))


def textured(*size: int, seed: int) -> Tensor:
    """Patches of 4x4 pixels, each of its own colour."""
    colours = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(seed))
    return interpolate(colours, scale_factor=4)[0]


def crossing(noise: float = 0.0, twin: bool = False) -> tuple[Clip, Tensor]:
    """A square that moves by 4 pixels a frame behind a bar; the last frame has noise, or another.

    Also where whole patches of 3x3 latent pixels of it are seen in frames 1 and 17.
    """
    ground, square, bar = textured(16, 32, seed=0), textured(6, 6, seed=1), textured(16, 8, seed=2)
    frames = []
    for i in range(18):
        frame = ground.clone()
        frame[:, 20:44, 8 + 4 * i :][..., :24] = square
        frame[..., 48:80] = bar
        frames.append(frame)
    if twin:
        frames[-1][:, 20:44, 104:] = square
    drawn = torch.randn(3, 64, 128, generator=torch.Generator().manual_seed(3))
    frames[-1] = (frames[-1] + noise * drawn).clamp(-1, 2)
    whole = torch.zeros(16, 32, dtype=torch.bool)
    whole[6:10, 5:8] = True  # 3 to 9 in frame 1, and 19 to 25 in frame 17, of which 20 on are seen
    return Clip.from_frames(torch.stack(frames)), whole


def test_what_flow_has_lost_behind_something_is_found_again() -> None:
    clip, whole = crossing()
    there, back = LatentFlow(clip, 4).between(1, 17)
    for found, where, expected in ((there, whole, 16.0), (back, whole.roll(16, 1), -16.0)):
        off = (found[:2] - torch.tensor([expected, 0.0])[:, None, None]).norm(dim=0)
        assert (off[where] < 0.5).float().mean() > 0.9
    still = torch.ones_like(whole)
    still[:, 1:26] = False  # what the square and the bar are more than two from
    assert (there[:2, still].norm(dim=0) < 0.1).all()


@pytest.mark.parametrize(("noise", "twin"), [(0.0, True), (0.6, False)], ids=["two", "noisy"])
def test_what_may_be_another_is_not_found(noise: float, twin: bool) -> None:
    clip, whole = crossing(noise, twin)
    there, _ = LatentFlow(clip, 4).between(1, 17)
    assert not (there[:2, whole] % 1 == 0).all(dim=0).any()  # no whole latent pixels


@pytest.mark.parametrize("upright", [False, True])
def test_flow_along_stripes_is_that_of_their_ends(upright: bool) -> None:
    ground, stripes = textured(32, 32, seed=0), torch.zeros(3, 48, 48)
    stripes[:, torch.arange(48) // 8 % 2 == 0] = 1.0
    frames = [0.2 * ground + 0.4 for _ in range(2)]
    for frame, left in zip(frames, (32, 34), strict=True):
        frame[:, 40:88, left : left + 48] = stripes
    clip = Clip.from_frames(torch.stack([frame.mT if upright else frame for frame in frames]))
    true = torch.tensor([0.0, 0.5] if upright else [0.5, 0.0])[:, None, None]

    def error(flow: ClipFlow) -> float:
        """Mean distance from the true flow, in latent pixels, inside the square."""
        off = torch.stack(
            [one[:2] - way * true for one, way in zip(flow.between(0, 1), (1, -1), strict=True)]
        )
        return float((off.mT if upright else off).norm(dim=1)[:, 12:20, 10:18].mean())

    assert error(LatentFlow(clip, 4)) < 0.4 * error(ClipFlow(clip, DIS(full=True), 4))
