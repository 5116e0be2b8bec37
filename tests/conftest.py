"""Real but tiny components: a random Stable Diffusion in diffusers' layout, and clips."""

from __future__ import annotations

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before the first import of a hub client
os.environ["TOKENFLOW_PREDICT__MODEL__DTYPE"] = "float32"  # "auto" depends on the processor

from pathlib import Path

import pytest

# imported here, and not by tokenflow, whose modules' import is hooked to check their types: the
# hook would have all of these compiled anew for each process
from diffusers import ControlNetModel, UNet2DConditionModel  # noqa: F401
from lightning.pytorch import cli  # noqa: F401
from transformers import CLIPTextModel  # noqa: F401

from tokenflow.diffusion import Backbone
from tokenflow.testing import tiny_clip, write_tiny_model
from tokenflow.video import Clip

ROOT = Path(__file__).parents[1]
LONGEST = ("miniature/test_edits.py", "training/test_control.py", "engine/ranks/test_group.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests begin first, so that no core waits for another at the end."""
    files = [ROOT / "tests" / name for name in LONGEST]
    items.sort(key=lambda item: item.path not in files)


def pytest_collection_finish() -> None:
    """What has been imported stays: the garbage collector need not walk over it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The command line's cache, which every test has for itself."""
    monkeypatch.setenv("TOKENFLOW_PREDICT__MODEL__CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion with the right shape, few channels and random weights."""
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def backbone(model_folder: Path) -> Backbone:
    """The tiny random model, on the CPU in float32."""
    return Backbone.load(model_folder, "cpu", "float32")


@pytest.fixture
def clip() -> Clip:
    """Nine random frames of 16×32 pixels."""
    return tiny_clip(9)


@pytest.fixture(scope="session")
def real_video() -> Path:
    """A real H.264 clip, where the checkout has one beside it."""
    path = ROOT.parent / "shared" / "data" / "woman-running.mp4"
    if not path.exists():
        pytest.skip("the real clip is not beside this checkout")
    return path
