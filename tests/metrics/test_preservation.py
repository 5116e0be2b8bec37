import math

import pytest
import torch

from tests.metrics.making import noise
from tokenflow.metrics import preservation, psnr


def test_the_mask_is_left_out() -> None:
    a = noise(2, 3, 8, 8)
    b, mask = a.clone(), torch.zeros(2, 8, 8, dtype=torch.bool)
    b[:, :, :4] = 0
    assert preservation(b, a, mask) == pytest.approx(psnr(b, a), abs=1e-4)
    mask[:, :4] = True
    assert math.isinf(preservation(b, a, mask))
    b[:, :, 4:] = a[:, :, 4:] + 0.1
    assert preservation(b, a, mask) == pytest.approx(20, abs=1e-3)
