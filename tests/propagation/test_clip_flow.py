import math

import pytest
import torch
from torch import Tensor

from tokenflow.errors import InputError
from tokenflow.propagation import ClipFlow, OpticalFlow, Window
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
