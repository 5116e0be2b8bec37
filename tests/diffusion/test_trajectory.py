import pytest
import torch

from tokenflow.diffusion import Trajectory


def test_latents_by_timestep_and_frame() -> None:
    latents = torch.randn(3, 5, 4, 2, 2)
    trajectory = Trajectory((801, 401, 1), latents, latents[0], latents[0], 0.01)
    assert len(trajectory) == 5
    assert torch.equal(trajectory.at(401), latents[1])
    assert torch.equal(trajectory.at(1, [4, 0]), latents[2][[4, 0]])
    with pytest.raises(ValueError, match="not in tuple"):
        trajectory.at(400)
