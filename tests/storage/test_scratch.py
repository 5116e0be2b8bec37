import resource

import pytest
import torch

from tokenflow.errors import InputError
from tokenflow.storage.scratch import empty_or_memmap


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


def test_a_disk_that_is_full_is_known_at_once() -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(InputError, match="free some space there, or name another folder"):
            empty_or_memmap(1000, budget=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
