"""What needs an accelerator."""

from pathlib import Path

import pytest
import torch

from tokenflow.diffusion import Backbone
from tokenflow.editors import PnP
from tokenflow.engine import Settings, edit_clip
from tokenflow.propagation import NNField
from tokenflow.video import Clip

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


def test_cpu_and_gpu_agree_in_float32(clip: Clip, model_folder: Path) -> None:
    results = [
        edit_clip(
            Backbone.load(model_folder, device, "float32"),
            clip,
            "a ball",
            PnP(),
            NNField(),
            settings=Settings(steps=3, keyframe_every=4),
        ).clip.frames
        for device in ("cpu", "cuda")
    ]
    # a near-tie may match another token, so the mean, not the largest difference
    assert (results[0] - results[1]).abs().mean() < 1e-3


def test_half_precision_stays_finite(clip: Clip, model_folder: Path) -> None:
    backbone = Backbone.load(model_folder, "cuda")
    assert backbone.dtype == torch.float16
    frames = edit_clip(backbone, clip, "a ball", PnP(), NNField(), settings=Settings(steps=3))
    assert torch.isfinite(frames.clip.frames).all()
