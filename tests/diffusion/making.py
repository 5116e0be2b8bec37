"""A tiny ControlNet that has an effect, for tests."""

from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, UNet2DConditionModel

CHANNELS = (4, 8)  # one halving, as the tiny VAE has


def make_controlnet(
    folder: Path, unet: UNet2DConditionModel, seed: int = 0, **changes: Any
) -> Path:
    """A copy of the UNet's encoder whose zero convolutions are random; `changes` of its config."""
    torch.manual_seed(seed)
    network = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=CHANNELS)
    if changes:
        network = ControlNetModel.from_config({**network.config, **changes})
    zero = [
        network.controlnet_cond_embedding.conv_out,
        network.controlnet_mid_block,
        *network.controlnet_down_blocks,
    ]
    for module in zero:
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    network.save_pretrained(folder)
    return folder
