import pytest
import torch

from tokenflow.diffusion import Conditioning


@pytest.fixture
def conditioning() -> Conditioning:
    """Two prompts with embeddings and pooled embeddings, as SDXL has."""
    return Conditioning(embeddings=torch.randn(2, 5, 4), pooled=torch.randn(2, 3))


def test_tensors_by_name(conditioning: Conditioning) -> None:
    assert len(conditioning) == 2
    assert conditioning["embeddings"].shape == (2, 5, 4)
    assert conditioning["pooled"] is conditioning.tensors["pooled"]
    with pytest.raises(KeyError):
        conditioning["time_ids"]


def test_every_tensor_has_a_row_per_prompt() -> None:
    with pytest.raises(ValueError, match=r"as many rows each, got .*'a': 2, 'b': 3"):
        Conditioning(a=torch.zeros(2, 1), b=torch.zeros(3, 1))
    with pytest.raises(ValueError, match="expected named tensors"):
        Conditioning()


def test_some_rows_in_their_order(conditioning: Conditioning) -> None:
    some = conditioning.rows([1, 0, 1])
    for name, tensor in conditioning.tensors.items():
        assert torch.equal(some[name], tensor[[1, 0, 1]])


def test_frames_of_a_branch_are_consecutive(conditioning: Conditioning) -> None:
    every = conditioning.per_frame(3)
    assert len(every) == 6
    for name, tensor in conditioning.tensors.items():
        by_branch = every[name].unflatten(0, (2, 3))
        for frame in range(3):
            assert torch.equal(by_branch[:, frame], tensor)


def test_a_function_of_every_tensor(conditioning: Conditioning) -> None:
    doubled = conditioning.map(lambda tensor: 2 * tensor)
    assert torch.equal(doubled["pooled"], 2 * conditioning["pooled"])
    assert not doubled.same_as(conditioning)


def test_sameness(conditioning: Conditioning) -> None:
    assert conditioning.same_as(conditioning.map(torch.clone))
    assert not conditioning.same_as(conditioning.rows([1, 0]))
    assert not conditioning.same_as(conditioning.rows([0]))
    assert not conditioning.same_as(Conditioning(embeddings=conditioning["embeddings"]))
