import resource
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.video.making import make_video, noise
from tokenflow.errors import InputError
from tokenflow.video import Clip, FrameBuffer, Frames, VideoError, levels, read_clip
from tokenflow.video import frames as frames_module
from tokenflow.video import reader as reader_module
from tokenflow.video.frames import DecodeCache

WHOLE = torch.rand(6, 3, 2, 4, generator=torch.Generator().manual_seed(0))


def lazy() -> Frames:
    return Frames(lambda number: WHOLE[number], range(6), (2, 4))


@pytest.mark.parametrize(
    "which", [0, -1, slice(1, 4), slice(None), slice(4, 1), [3, 0, -2], torch.tensor([5, 2])]
)
def test_frames_are_indexed_as_a_tensor(which: int | slice | list[int] | Tensor) -> None:
    assert torch.equal(lazy()[which], WHOLE[which])
    assert torch.equal(lazy().part(slice(1, 6))[1:3], WHOLE[2:4])


def test_frames_have_shape_length_and_order() -> None:
    frames = lazy()
    assert frames.shape == WHOLE.shape
    assert len(frames) == 6
    assert all(torch.equal(a, b) for a, b in zip(frames, WHOLE, strict=True))
    with pytest.raises(IndexError):
        frames[6]


class Decoder:
    """Says how often it began, and what was converted."""

    def __init__(self) -> None:
        self.begun, self.converted = 0, []  # type: ignore[var-annotated]

    def __call__(self) -> Iterator[Callable[[], Tensor]]:
        self.begun += 1

        def convert(number: int) -> Tensor:
            self.converted.append(number)
            return WHOLE[number]

        return (lambda number=number: convert(number) for number in range(6))  # type: ignore[misc]


def test_a_reel_decodes_forwards_and_converts_what_is_wanted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(frames_module, "REACH", 1)
    decoder = Decoder()
    cache = DecodeCache(decoder)
    assert all(torch.equal(cache.frame(number), WHOLE[number]) for number in (1, 4, 1, 5))
    assert (decoder.begun, decoder.converted) == (1, [0, 1, 3, 4, 5])


def test_frames_before_a_keyframe_are_not_decoded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for as an optical flow is, from each frame to the two keyframes beside it."""
    monkeypatch.setattr(frames_module, "REACH", 2)
    decoder = Decoder()
    cache = DecodeCache(decoder, budget=4 * WHOLE[0].nbytes)
    for frame in range(6):
        for number in (frame, 3 * (frame // 3), min(3 * (frame // 3 + 1), 5)):
            assert torch.equal(cache.frame(number), WHOLE[number])
    assert (decoder.begun, decoder.converted) == (1, [0, 1, 2, 3, 4, 5])


def test_what_is_made_once_is_kept_as_levels() -> None:
    asked: list[int] = []

    def frame(number: int) -> Tensor:
        asked.append(number)
        return WHOLE[number]

    once = Frames(frame, range(1, 6), (2, 4)).made_once()
    for which in ([3, 0], [4, 3], slice(None), slice(None)):
        assert torch.equal(once[which], levels(WHOLE[1:][which]) / 255)
    assert asked == [4, 1, 5, 2, 3]


def test_a_reduced_clip_has_means_of_pixels() -> None:
    clip = Clip.from_frames(WHOLE).part(range(2, 5))
    small = clip.reduced(2)
    assert (small.frames.shape, small.positions) == ((3, 3, 1, 2), range(2, 5))
    means = WHOLE[2:5].unflatten(3, (2, 2)).mean(dim=(2, 4))[:, :, None]
    assert torch.allclose(small.frames[:], means, rtol=0, atol=0.5 / 255 + 1e-6)
    assert clip.reduced(1) is clip


def test_a_reel_holds_its_budget_and_begins_anew() -> None:
    decoder = Decoder()
    cache = DecodeCache(decoder, budget=2 * WHOLE[0].nbytes)
    for number in (0, 1, 2, 1, 0, 3):
        assert torch.equal(cache.frame(number), WHOLE[number])
        assert cache.size == sum(image.nbytes for image in cache.kept.values()) <= cache.budget
    assert (decoder.begun, decoder.converted) == (2, [0, 1, 2, 0, 3])
    with pytest.raises(IndexError, match="there is no frame 6"):
        cache.frame(6)


@pytest.mark.parametrize("budget", [1, 10**6])
def test_a_spool_gives_back_levels(budget: int) -> None:
    buffer = FrameBuffer((2, 4), budget)
    buffer.extend(WHOLE[:4])
    buffer.append(levels(WHOLE[4]))
    assert torch.equal(buffer.frames[:], levels(WHOLE[:5]) / 255)
    buffer.append(levels(WHOLE[5]))  # also after something was read
    assert torch.equal(buffer.frames[[5, 0]], levels(WHOLE[[5, 0]]) / 255)


def test_a_spool_on_a_full_disk() -> None:
    buffer = FrameBuffer((2, 4), budget=1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, before[1]))
    try:
        with pytest.raises(InputError, match="free some space there, or name another folder"):
            buffer.extend(WHOLE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_clip_that_is_not_in_memory_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_video(tmp_path / "clip.mp4", noise(10, 32, 48))
    choice = dict(start=1, stride=2, resolution=16, multiple=8)
    whole: Clip = read_clip(path, **choice)  # type: ignore[arg-type]
    monkeypatch.setattr(reader_module, "BUDGET", 2 * whole.frames[0].nbytes)
    clip: Clip = read_clip(path, **choice, in_memory=False)  # type: ignore[arg-type]
    assert isinstance(clip.frames, Frames)
    assert not isinstance(whole.frames, Frames)
    for _ in range(2):
        assert torch.equal(clip.frames[:], whole.frames)
    part = clip.part(range(2, 4))
    assert isinstance(part.frames, Frames)
    assert (part.first, part.total) == (2, 5)
    assert torch.equal(part.frames[:], whole.frames[2:4])
    assert torch.equal(part.frame(3), whole.frame(3))
    for what in ("times", "rate", "name", "display_size", "audio"):
        assert getattr(clip, what) == getattr(whole, what)
    path.unlink()
    with pytest.raises(VideoError, match=r"has changed since it was read first .*found nothing"):
        clip.frames[:]


def test_a_frame_stays_as_it_is() -> None:
    """Though its place is another frame's by now."""
    cache = DecodeCache(
        lambda: (partial(torch.full, (3, 2, 4), float(n)) for n in range(5)), budget=200
    )
    first, again = cache.frame(0), cache.frame(0)
    assert [float(cache.frame(n).mean()) for n in range(5)] == [0, 1, 2, 3, 4]
    assert list(cache.kept) == [3, 4]
    assert first.max() == again.max() == 0
