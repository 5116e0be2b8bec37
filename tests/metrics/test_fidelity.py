import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from tests.metrics.making import noise
from tokenflow.metrics import decibels, psnr, ssim

A, B = noise(2, 3, 24, 31), (noise(2, 3, 24, 31) + 0.3 * noise(2, 3, 24, 31, seed=1)) / 1.3


def test_psnr_of_known_errors() -> None:
    zeros = torch.zeros(2, 3, 4, 4)
    assert psnr(zeros, zeros + 0.1) == pytest.approx(20, abs=1e-4)  # float32 of 0.1 squared
    assert psnr(zeros, zeros + 1) == 0
    assert math.isinf(psnr(zeros, zeros))
    assert math.isinf(decibels(0.0))
    assert decibels(0.01) == pytest.approx(20)
    assert math.isnan(decibels(math.nan))  # of no pixels, or of broken ones


def test_psnr_is_scikit_images() -> None:
    expected = peak_signal_noise_ratio(A.numpy(), B.numpy(), data_range=1.0)
    assert psnr(A, B) == pytest.approx(expected, abs=1e-4)


def test_a_mask_is_left_out_of_psnr() -> None:
    a = noise(2, 3, 8, 8)
    b, mask = a.clone(), torch.zeros(2, 8, 8, dtype=torch.bool)
    b[:, :, :4] = 0
    assert psnr(b, a, mask) == pytest.approx(psnr(b, a), abs=1e-4)
    mask[:, :4] = True
    assert math.isinf(psnr(b, a, mask))
    b[:, :, 4:] = a[:, :, 4:] + 0.1
    assert psnr(b, a, mask) == pytest.approx(20, abs=1e-3)
    assert math.isnan(psnr(b, a, ~torch.zeros_like(mask)))


def test_ssim_is_scikit_images() -> None:
    expected = [
        structural_similarity(
            a, b, data_range=1.0, channel_axis=0, gaussian_weights=True, sigma=1.5,
            use_sample_covariance=False,
        )
        for a, b in zip(A.double().numpy(), B.double().numpy(), strict=True)
    ]  # fmt: skip
    # float32 sums of 121 products, and differences of them
    np.testing.assert_allclose(ssim(A, B).numpy(), expected, atol=1e-5)
    assert ssim(A, A).tolist() == pytest.approx([1, 1], abs=1e-6)
