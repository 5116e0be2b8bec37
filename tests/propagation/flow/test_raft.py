import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tokenflow.errors import InputError
from tokenflow.propagation import RAFT
from tokenflow.video import Clip

optical_flow = pytest.importorskip(
    "torchvision.models.optical_flow", reason="torchvision is not installed; RAFT is its network"
)
CLIP = Clip.from_frames(torch.rand(2, 3, 48, 136, generator=torch.Generator().manual_seed(0)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of the small network, in both formats."""
    folder = tmp_path_factory.mktemp("raft")
    torch.manual_seed(0)
    weights = optical_flow.raft_small(weights=None).state_dict()
    torch.save(weights, folder / "small.pth")
    save_file(weights, folder / "small.safetensors")
    return folder


def raft(file: Path) -> RAFT:
    return RAFT(str(file), size="small", updates=2, device="cpu")


def test_both_formats_give_the_same_flow(folder: Path) -> None:
    flows = []
    for name in ("small.pth", "small.safetensors"):
        provider = raft(folder / name)
        provider.prepare(CLIP)
        flows.append(provider.between(CLIP, 0, 1))
    assert flows[0].shape == (2, 48, 136)
    assert flows[0].dtype == torch.float32
    assert flows[0].isfinite().all()
    assert flows[0].abs().max() > 0
    assert torch.equal(*flows)


def test_the_network_is_loaded_once(folder: Path) -> None:
    provider = raft(folder / "small.pth")
    provider.prepare(CLIP)
    network = provider.network
    provider.prepare(CLIP)
    assert provider.network is network


def test_frames_come_in_the_order_asked_for(folder: Path) -> None:
    provider = raft(folder / "small.pth")
    swapped = Clip.from_frames(CLIP.frames.flip(0))
    assert torch.equal(provider.between(CLIP, 0, 1), provider.between(swapped, 1, 0))
    assert not torch.equal(provider.between(CLIP, 0, 1), provider.between(CLIP, 1, 0))


def test_no_weights(tmp_path: Path) -> None:
    message = r"no weights at .*none\.pth; expected a file of torchvision's raft_small"
    with pytest.raises(InputError, match=message):
        raft(tmp_path / "none.pth").prepare(CLIP)


def test_weights_of_the_other_size(folder: Path) -> None:
    with pytest.raises(InputError, match=r"small\.pth does not load as torchvision's raft_large"):
        RAFT(str(folder / "small.pth"), device="cpu").prepare(CLIP)


@pytest.mark.parametrize("name", ["broken.pth", "broken.safetensors"])
def test_a_damaged_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"not weights at all")
    with pytest.raises(InputError, match=rf"{name} does not load as .* as it was published"):
        raft(tmp_path / name).prepare(CLIP)


@pytest.mark.parametrize("held", [[1, 2], torch.zeros(3), {1: torch.zeros(3)}, None])
def test_a_file_without_tensors_by_name(tmp_path: Path, held: object) -> None:
    torch.save(held, tmp_path / "other.pth")
    with pytest.raises(
        InputError, match=r"other\.pth does not load as .*: expected tensors by name, got"
    ):
        raft(tmp_path / "other.pth").prepare(CLIP)


class Malicious:
    def __reduce__(self) -> tuple[object, ...]:
        return (open, ("stolen", "w"))


def test_a_pickle_that_runs_code_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": Malicious()}, "evil.pth")
    with pytest.raises(InputError, match=r"evil\.pth does not load .* more than tensors"):
        raft(tmp_path / "evil.pth").prepare(CLIP)
    assert not (tmp_path / "stolen").exists()


def test_without_torchvision(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(
        InputError, match=r"RAFT needs torchvision .* pip install 'tokenflow\[raft\]'"
    ):
        raft(folder / "small.pth").prepare(CLIP)


def test_updates_out_of_range() -> None:
    with pytest.raises(InputError, match="updates must be at least 1, got 0"):
        RAFT("weights.pth", updates=0)
