"""A compiled network: the same edit, by programs that serve every pass."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention import FeedForward
from torch import nn

from tests.gaussian_flow import GaussianFlow
from tokenflow.diffusion import Backbone, ModelError
from tokenflow.editors import PnP, Prompts
from tokenflow.engine import Settings, edit_clip
from tokenflow.propagation import NNField
from tokenflow.testing import tiny_clip

SETTINGS = Settings(steps=2, keyframe_every=4, batch=4)


@pytest.fixture(scope="module")
def compiled(model_folder: Path) -> Backbone:
    """The tiny model, whose feed-forward layers have two widths; about 5 s."""
    if not any(map(shutil.which, ("g++", "clang++"))):
        pytest.skip("no C++ compiler")
    return Backbone.load(model_folder, "cpu", "float32", compile=True)


def edited(model: Backbone, seed: int) -> torch.Tensor:
    """The latents of five frames in windows of four, and so passes of several batches."""
    clip = tiny_clip(5)
    clip.frames[:] = torch.rand(clip.frames.shape, generator=torch.Generator().manual_seed(seed))
    return edit_clip(model, clip, Prompts("a ball"), PnP(), NNField(), SETTINGS).latents


@pytest.mark.full
def test_an_edit_is_the_same_and_compiles_nothing(compiled: Backbone, backbone: Backbone) -> None:
    with torch.compiler.set_stance("fail_on_recompile"):
        frames = [edited(compiled, seed) for seed in (0, 1)]
    for seed, found in enumerate(frames):
        # GELU's product is rounded once where it was twice
        torch.testing.assert_close(found, edited(backbone, seed), atol=1e-4, rtol=0)


@pytest.mark.full
def test_layers_keep_their_names_and_weights(compiled: Backbone, backbone: Backbone) -> None:
    names = [name for name, _ in backbone.network.named_modules()]
    assert [name for name, _ in compiled.network.named_modules()] == names
    assert compiled.fingerprint == backbone.fingerprint


def test_a_network_that_cannot_be_compiled(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise OSError("no compiler")

    monkeypatch.setattr(nn.Module, "compile", lambda *_, **__: None)
    monkeypatch.setattr(FeedForward, "forward", fails)
    message = r"cannot be compiled on cpu: OSError: no compiler; install a C\+\+ compiler, or leave"
    with pytest.raises(ModelError, match=message):
        Backbone.load(model_folder, "cpu", "float32", compile=True)


def test_a_family_that_compiles_nothing() -> None:
    with pytest.raises(ModelError, match="a GaussianFlow cannot be compiled; leave compile at fal"):
        GaussianFlow().compile()
