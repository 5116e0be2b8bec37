from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.metrics.making import noise, write_random_alexnet
from tokenflow.errors import InputError
from tokenflow.metrics import load_lpips, lpips

pytest.importorskip("torchvision.models", reason="torchvision is LPIPS's extra")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_alexnet(tmp_path_factory.mktemp("lpips"))


def test_distances(weights: Path) -> None:
    network = load_lpips(str(weights))
    a, b = noise(3, 3, 35, 40), noise(3, 3, 35, 40, seed=1)
    assert lpips(network, a, a).tolist() == [0, 0, 0]
    near, far = lpips(network, a, 0.9 * a + 0.1 * b), lpips(network, a, b)
    assert (near > 0).all()
    assert (near < far).all()
    torch.testing.assert_close(lpips(network, b, a), far)


def test_the_weights_are_those_of_the_file(weights: Path) -> None:
    loaded = load_lpips(str(weights)).net.state_dict()
    assert torch.equal(loaded["slice5.10.weight"], load_file(weights)["features.10.weight"])


def test_other_files_are_refused(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no weights at .* torchvision's alexnet"):
        load_lpips(str(tmp_path / "gone.pth"))
    save_file({"features.0.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(
        InputError, match=r"(?s)does not load as torchvision's alexnet.*slice1\.0\.bias"
    ):
        load_lpips(str(tmp_path / "other.safetensors"))
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="does not load as torchvision's alexnet"):
        load_lpips(str(tmp_path / "broken.safetensors"))
