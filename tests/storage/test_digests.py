"""What is the same has the same digest, and nothing else has."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from tokenflow.storage import digests


def test_tensors_count_with_names_shapes_types_and_values() -> None:
    a = torch.arange(4.0)
    others = [
        {"y": a}, {"x": a.reshape(2, 2)}, {"x": a.view(torch.int32)}, {"x": a + 1},
        {"x": a, "y": a}, {"x": a.bfloat16()}, {"x": a[:0]}, {"x": a[0]},
    ]  # fmt: skip
    assert len({digests.of_tensors(tensors) for tensors in [{"x": a}, *others]}) == 9
    strided = torch.stack([a, a], dim=1)[:, 0]
    assert digests.of_tensors({"x": a}) == digests.of_tensors({"x": strided})


def test_a_network_is_the_same_wherever_it_lies(model_folder: Path, tmp_path: Path) -> None:
    first = UNet2DConditionModel.from_pretrained(model_folder / "unet")
    first.save_pretrained(tmp_path)
    assert digests.of_network(UNet2DConditionModel.from_pretrained(tmp_path)) == digests.of_network(
        first
    )
