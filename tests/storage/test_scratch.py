import resource

import pytest
import torch

from tokenflow.errors import InputError
from tokenflow.storage.scratch import Spill, empty_or_memmap


@pytest.mark.parametrize("budget", [0, 10**6])
def test_room_holds_what_is_put_in_it(budget: int) -> None:
    values = torch.rand(3, 5, 7)
    there = empty_or_memmap(3, 5, 7, budget=budget)
    there[:, 2] = values[:, 2]
    there[0] = values[0]
    assert torch.equal(there[0], values[0])
    assert torch.equal(there[1:, 2], values[1:, 2])
    assert there.dtype == torch.float32
    assert there.is_contiguous()


def test_what_is_beyond_the_budget_is_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenflow.storage.scratch.BLOCK", 100)
    spill, given = Spill(budget=50), []
    for number, dtype in enumerate((torch.float32, torch.uint8, torch.int64, torch.bool) * 3):
        given.append((torch.rand(3, number) > 0.5).to(dtype))
    kept = [spill.keep(tensor) for tensor in given]
    assert {a is b for a, b in zip(kept, given, strict=True)} == {True, False}
    assert spill.size <= 50
    for one, other in zip(kept, given, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_a_disk_that_is_full_is_known_at_once() -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(InputError, match="free some space there, or name another folder"):
            empty_or_memmap(1000, budget=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
