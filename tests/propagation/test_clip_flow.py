import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from tokenflow.errors import InputError
from tokenflow.miniature.edits import SceneFlow
from tokenflow.miniature.scenes import random_scene
from tokenflow.propagation import DIS, ClipFlow, LatentFlow, OpticalFlow, Window
from tokenflow.video import Clip

FRAMES, HEIGHT, WIDTH, SCALE = 6, 32, 48, 4
CLIP = Clip.from_frames(torch.rand(FRAMES, 3, HEIGHT, WIDTH))
WINDOW = Window(
    frames=(1, 2, 3),
    keyframes=(2, 5),
    neighbours=torch.tensor([[0, 0], [0, 0], [0, 1]]),
    blend=torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.5, 0.5]]),
    height=4,
    width=6,
)
CPU = torch.device("cpu")


class Panning(OpticalFlow):
    """Everything moves by (4, -2) pixels per frame; counts what it is asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []
        self.prepared = 0

    def prepare(self, clip: Clip) -> None:
        self.prepared += 1

    def between(self, clip: Clip, start: int, end: int) -> Tensor:
        self.asked.append((start, end))
        step = torch.tensor([4.0, -2.0])[:, None, None]
        return (end - start) * step.expand(-1, *clip.frames.shape[-2:]).clone()


def test_each_pair_is_computed_once_and_a_frame_with_itself_never() -> None:
    provider = Panning()
    flow = ClipFlow(CLIP, provider, SCALE)
    assert provider.prepared == 1
    for _ in range(3):
        flow.motion(WINDOW, CPU)
        flow.between(5, 3)
    assert sorted(provider.asked) == [(1, 2), (2, 1), (2, 3), (3, 2), (3, 5), (5, 3)]


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
    frames[-1] += noise * torch.randn(3, 64, 128, generator=torch.Generator().manual_seed(3))
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
    still[:, 2:26] = False  # what neither the square nor the bar is near
    assert (there[:2, still].norm(dim=0) < 0.1).all()


@pytest.mark.parametrize(("noise", "twin"), [(0.0, True), (0.6, False)], ids=["two", "noisy"])
def test_what_may_be_another_is_not_found(noise: float, twin: bool) -> None:
    clip, whole = crossing(noise, twin)
    there, _ = LatentFlow(clip, 4).between(1, 17)
    assert not (there[:2, whole] % 1 == 0).all(dim=0).any()  # no whole latent pixels


def test_flow_beyond_the_memory_budget_is_in_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenflow.propagation.clip_flow.BUDGET", 24 * HEIGHT * WIDTH)
    provider = Panning()
    flow = ClipFlow(CLIP, provider)
    in_memory = ClipFlow(CLIP, Panning(), budget=10**9)
    for i in (0, 1, 2, 0, 1, 2):
        assert torch.equal(flow.between(i, i + 1)[1], in_memory.between(i, i + 1)[1])
    assert len(provider.asked) == 6
    assert flow.spill.size == 24 * HEIGHT * WIDTH
    assert len(flow.spill.block) > 0


def test_pairs_beyond_the_budget_are_measured_each_time() -> None:
    provider = Panning()
    flow = ClipFlow(CLIP, provider, budget=2 * 24 * HEIGHT * WIDTH)
    first, again = ([flow.between(i, i + 1)[0] for i in range(3)] for _ in range(2))
    assert [a is b for a, b in zip(first, again, strict=True)] == [True, True, False]
    assert torch.equal(first[2], again[2])
    assert len(provider.asked) == 8


def test_displacement_is_in_latent_pixels_of_the_site() -> None:
    flow = ClipFlow(CLIP, Panning(), SCALE)
    full, back = flow.between(3, 5)
    assert torch.equal(back[:2], -full[:2])
    assert full.shape == (3, HEIGHT // SCALE, WIDTH // SCALE)
    assert torch.equal(full[:, 2, 3], torch.tensor([2.0, -1.0, 0.0]))
    motion = flow.motion(WINDOW, CPU)  # 8 pixels of a frame in one of the site's
    assert motion.displacement.shape == (3, 2, 24, 2)
    assert motion.inconsistency.shape == (3, 2, 24)
    expected = torch.tensor([[(0.5, -0.25)] * 2, [(0.0, 0.0)] * 2, [(-0.5, 0.25), (1.0, -0.5)]])
    assert torch.equal(motion.displacement, expected[:, :, None].expand(-1, -1, 24, -1))
    assert (motion.inconsistency == 0).all()


def test_tokens_are_in_row_order() -> None:
    class Ramp(Panning):
        def between(self, clip: Clip, start: int, end: int) -> Tensor:
            y, x = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
            return torch.stack((x, y)).float()

    motion = ClipFlow(CLIP, Ramp(), SCALE).motion(WINDOW, CPU)
    # the mean position in each 8x8 block, in blocks
    x, y = torch.arange(6) + 3.5 / 8, torch.arange(4) + 3.5 / 8
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).flatten(0, 1)
    assert torch.allclose(motion.displacement[0, 0], grid)


def test_inconsistency_is_what_the_way_there_and_back_misses() -> None:
    class Covered(Panning):
        """Left half moves right by 24 pixels, over what stands still on the right."""

        def between(self, clip: Clip, start: int, end: int) -> Tensor:
            flow = torch.zeros(2, HEIGHT, WIDTH)
            if start < end:
                flow[0, :, : WIDTH // 2] = WIDTH / 2
            else:
                flow[0, :, WIDTH // 2 :] = -WIDTH / 2
            return flow

    there, _ = ClipFlow(CLIP, Covered(), SCALE).between(0, 1)
    assert (there[2, :, :6] == 0).all(), "the moving half comes back"
    assert (there[2, :, 6:] == 6).all(), "what is covered comes back 24 pixels away, 6 latents"


@pytest.mark.parametrize(
    ("flow", "message"),
    [
        (torch.zeros(2, 4, 4), r"Wrong from frame 0 to 1 is a flow of shape \(2, 4, 4\), expected"),
        (torch.full((2, HEIGHT, WIDTH), math.nan), r"Wrong from frame 0 to 1 has NaN or infinite"),
    ],
)
def test_a_wrong_provider_is_named(flow: Tensor, message: str) -> None:
    class Wrong(Panning):
        def between(self, clip: Clip, start: int, end: int) -> Tensor:
            return flow

    with pytest.raises(InputError, match=message):
        ClipFlow(CLIP, Wrong(), SCALE).between(0, 1)
