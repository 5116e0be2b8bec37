from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tokenflow.engine.joint import full, windowed
from tokenflow.engine.keyframes import draw_keyframes, split_windows
from tokenflow.engine.ranks.group import FrameGroup
from tokenflow.engine.spans import spans


def latents(frames: Sequence[int]) -> Tensor:
    """Of each frame its number."""
    return torch.tensor(frames, dtype=torch.float32)[:, None, None, None, None].expand(
        -1, 2, 1, 1, 1
    )


class Told(FrameGroup):
    """One rank of several, and what all of them would say."""

    said: Tensor

    def gather(self, own: Tensor, counts: Sequence[int], host: bool = False) -> Tensor:
        assert host
        mine = slice(sum(counts[: self.rank]), sum(counts[: self.rank + 1]))
        assert torch.equal(own[: counts[self.rank]], self.said[mine])
        return self.said


def passes(windows: int, rank: int, size: int) -> tuple[Any, list[int], list[Any]]:
    split = split_windows(3 * windows - 1, 3)
    keyframes = draw_keyframes(split, "random", 0, "clip", 0)
    group = Told(rank, size)
    group.said = latents(keyframes)
    share = group.share(split)
    return share, keyframes, windowed(keyframes, latents, group, share, spans(windows, 3, 1, 1))


@pytest.mark.parametrize("windows", [1, 2, 5, 9])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_ranks_do_the_passes_of_their_windows_as_one_would(windows: int, size: int) -> None:
    alone = {tuple(joint.frames) for joint in passes(windows, 0, 1)[2]}
    done = []
    for rank in range(size):
        share, keyframes, mine = passes(windows, rank, size)
        assert [number for joint in mine for number in joint.windows] == list(share.own)
        done += [] if share.idle else [number for joint in mine for number in joint.windows]
        for joint in mine:
            assert tuple(joint.frames) in alone
            assert torch.equal(joint.latents, latents(joint.frames))
            kept = joint.keep(torch.tensor(joint.frames)).tolist()
            assert kept == [keyframes[number] for number in joint.held]
            for number in joint.windows:
                beside = {number - 1, number, number + 1} & set(share.held)
                assert beside <= set(joint.held) <= set(share.held)
    assert done == list(range(windows))


def test_full_attention_is_one_pass_of_the_ranks_own_keyframes() -> None:
    split = split_windows(10, 3)
    group = FrameGroup()
    [joint] = full([0, 4, 6, 9], latents, group, group.share(split))
    assert joint.frames == [0, 4, 6, 9]
    assert joint.windows == joint.held == range(4)
    items = torch.arange(4)
    assert torch.equal(joint.gather(items), items)
    assert torch.equal(joint.keep(items), items)
