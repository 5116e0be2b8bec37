import math
import shutil
from pathlib import Path

import pytest
import torch

from tests.metrics.making import noise, still, write_tiny_clip
from tokenflow.diffusion.loading import ModelError
from tokenflow.metrics import ClipEmbedder, frame_consistency, text_alignment


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_clip(tmp_path_factory.mktemp("clip"))


def test_vectors_have_length_1_and_scores_are_cosines(folder: Path) -> None:
    frames = torch.cat([still(2, 16, 24), noise(18, 3, 16, 24, seed=1)])
    images, text = ClipEmbedder(str(folder))(frames, "a blue ball on sand")
    assert images.shape == (20, 8)
    assert images.norm(dim=1).tolist() == pytest.approx([1] * 20, abs=1e-5)
    assert float(text.norm()) == pytest.approx(1, abs=1e-5)
    aligned, consistent = text_alignment(images, text), frame_consistency(images)
    assert aligned.shape == (20,)
    assert consistent.shape == (19,)
    assert aligned.abs().max() <= 1 + 1e-5
    assert float(consistent[0]) == pytest.approx(1, abs=1e-5)  # the same picture twice
    assert float(consistent[1]) < 1 - 1e-5


def test_texts_differ_and_long_ones_are_cut(folder: Path) -> None:
    embed = ClipEmbedder(str(folder))
    texts = [embed(still(1), text)[1] for text in ("a red box", "a blue ball")]
    assert not torch.allclose(*texts, atol=1e-3)
    assert embed(still(1), "a red box " * 100)[1].isfinite().all()


def test_long_texts_are_cut_where_the_tokenizer_knows_no_limit(
    folder: Path, tmp_path: Path
) -> None:
    bare = Path(shutil.copytree(folder, tmp_path / "bare"))
    (bare / "tokenizer_config.json").unlink()
    long = "a red box " * 100
    texts = [ClipEmbedder(str(f))(still(1), long)[1] for f in (folder, bare)]
    torch.testing.assert_close(*texts)


def test_scores_of_known_vectors() -> None:
    angle = torch.tensor([0.0, math.pi / 3, math.pi])
    images = torch.stack([angle.cos(), angle.sin()], dim=1)
    assert text_alignment(images, images[0]).tolist() == pytest.approx([1, 0.5, -1], abs=1e-6)
    assert frame_consistency(images).tolist() == pytest.approx([0.5, -0.5], abs=1e-6)


def test_pickles_and_folders_without_a_model_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json; download one"):
        ClipEmbedder("openai/clip-vit-base-patch32")
    bad = Path(shutil.copytree(folder, tmp_path / "pickled"))
    (bad / "model.safetensors").rename(bad / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled weights are not read"):
        ClipEmbedder(str(bad))
    worse = Path(shutil.copytree(folder, tmp_path / "blind"))
    (worse / "preprocessor_config.json").unlink()
    with pytest.raises(ModelError, match="the image processor"):
        ClipEmbedder(str(worse))
