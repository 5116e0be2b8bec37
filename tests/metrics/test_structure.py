import sys

import numpy as np
import pytest
import torch

from tests.metrics.making import noise
from tokenflow.metrics import structure


def naive(a: np.ndarray, b: np.ndarray) -> float:
    """For one frame, with NumPy's gradient and correlation."""
    strengths = []
    for image in (a, b):
        luma = 0.299 * image[0] + 0.587 * image[1] + 0.114 * image[2]
        strengths.append(np.hypot(*np.gradient(luma)).ravel())
    return float(np.corrcoef(strengths)[0, 1])


def test_against_numpy() -> None:
    a, b = noise(2, 3, 9, 11), noise(2, 3, 9, 11) ** 2
    expected = [naive(*pair) for pair in zip(a.numpy(), b.numpy(), strict=True)]
    assert structure(a, b).tolist() == pytest.approx(expected, abs=1e-5)


def test_other_colours_and_inverted_ones_keep_it_and_other_places_do_not() -> None:
    a = noise(1, 3, 40, 40)
    assert float(structure(0.2 + 0.5 * a, a)) == pytest.approx(1, abs=1e-5)
    assert float(structure(1 - a, a)) == pytest.approx(1, abs=1e-5)
    # of 1600 pixels, whose neighbours share a pixel: within four times 1 / 40
    assert abs(float(structure(noise(1, 3, 40, 40, seed=1), a))) < 0.1
    assert float(structure(torch.zeros(1, 3, 40, 40), a)) == 0


def test_a_mask_leaves_out_what_is_edited() -> None:
    a = noise(1, 3, 20, 20)
    b, mask = a.clone(), torch.zeros(1, 20, 20, dtype=torch.bool)
    b[..., 5:10, 5:10] = 0
    mask[:, 5:10, 5:10] = True
    assert float(structure(b, a)) < 0.95
    assert float(structure(b, a, mask)) == pytest.approx(1, abs=1e-6)


def test_a_frame_that_the_mask_hides_is_on_the_frames_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = sys.modules["tokenflow.metrics.structure"]  # whose name is also the function's
    monkeypatch.setattr(module, "luma", lambda image: image.mean(dim=0))
    a, mask = noise(2, 3, 9, 9), torch.zeros(2, 9, 9, dtype=torch.bool)
    mask[1] = True
    with torch.device("meta"):  # where a tensor comes to be whose device is not said
        scores = structure(a, a, mask)
    assert scores.tolist() == pytest.approx([1, torch.nan], nan_ok=True)
