import math

import pytest
import torch

from tests.metrics.making import noise
from tokenflow.metrics import Preservation, preservation, psnr


def test_the_mask_is_left_out() -> None:
    a = noise(2, 3, 8, 8)
    b, mask = a.clone(), torch.zeros(2, 8, 8, dtype=torch.bool)
    b[:, :, :4] = 0
    assert preservation(b, a, mask) == pytest.approx(psnr(b, a), abs=1e-4)
    mask[:, :4] = True
    assert math.isinf(preservation(b, a, mask))
    b[:, :, 4:] = a[:, :, 4:] + 0.1
    assert preservation(b, a, mask) == pytest.approx(20, abs=1e-3)


def test_the_metric_is_on_its_states_device() -> None:
    a, metric = noise(2, 3, 8, 8), Preservation()
    metric.update(0.9 * a, a, torch.zeros(2, 8, 8, dtype=torch.bool))
    with torch.device("meta"):  # where a tensor comes to be whose device is not said
        found = metric.compute()
    assert float(found) == pytest.approx(psnr(0.9 * a, a), abs=1e-4)
