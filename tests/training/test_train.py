from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokenflow.diffusion import Backbone
from tokenflow.miniature import LCM, TRANSFORMER, WEIGHTS
from training.modules import TrainingModule
from training.stills import Endless, encoded, to_signed, version
from training.train import fit

MIB = 2**20


def test_the_weights_are_small_and_of_a_safe_kind() -> None:
    models = [folder for folder in (WEIGHTS, TRANSFORMER, LCM) if folder.exists()]
    files = [file for model in models for file in model.rglob("*") if file.is_file()]
    assert {file.suffix for file in files} == {".safetensors", ".json", ".txt"}
    assert max(file.stat().st_size for file in files) < 16 * MIB
    assert sum(file.stat().st_size for file in files) < 64 * MIB
    configurations = [file for file in files if file.name == "config.json"]
    assert not [file for file in configurations if "_name_or_path" in file.read_text()]


class Line(TrainingModule):
    """Fits y = 2x, and keeps its weight at every batch."""

    def __init__(self) -> None:
        super().__init__(rate=0.1)
        self.layer = nn.Linear(1, 1)
        self.weights: list[float] = []

    def loss(self, x: Float[Tensor, "batch 1"]) -> Tensor:
        self.weights.append(self.layer.weight.item())
        return (self.layer(x) - 2 * x).square().mean()


def test_a_training_that_was_cut_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = Endless(torch.randn(64, 1), batch=16)
    first, second = Line(), Line()
    fit(first, data, 100, tmp_path, "32-true")
    assert len(first.weights) == 100
    fit(second, data, 150, tmp_path, "32-true")
    assert len(second.weights) == 50
    assert second.global_step == 150
    assert second.weights[0] == first.layer.weight.item() != first.weights[0]


def test_a_training_that_is_done_gives_its_average_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = Endless(torch.randn(64, 1), batch=16)
    first, second = Line(), Line()
    fit(first, data, 200, tmp_path, "32-true", average=True)
    fit(second, data, 200, tmp_path, "32-true", average=True)
    assert second.weights == []
    assert second.layer.weight.item() == first.layer.weight.item() != first.weights[-1]


def test_stills_are_encoded_in_single_precision(backbone: Backbone, tmp_path: Path) -> None:
    stills = (256 * torch.rand(3, 3, 32, 32)).byte()
    torch.save(stills, tmp_path / f"images-{version()}.pt")
    with torch.inference_mode():
        code = backbone.vae.encode(to_signed(stills)).latent_dist.mean
    expected = code * backbone.vae.config.scaling_factor
    torch.testing.assert_close(encoded(tmp_path, backbone.vae), expected)
