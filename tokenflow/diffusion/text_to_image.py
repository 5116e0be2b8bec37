"""Text to image: one sampling loop by DDIM with guidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tokenflow.diffusion.backbone import Backbone
from tokenflow.diffusion.schedule import guide


@torch.inference_mode()
def text_to_image(
    backbone: Backbone,
    prompts: Sequence[str],
    steps: int,
    guidance: float,
    seed: int,
    inputs: Callable[[Float[Tensor, "2n c h w"], int], dict[str, Any]] | None = None,
) -> Float[Tensor, "n 3 height width"]:
    """One image of the model's size for each prompt, in 0..1.

    Args:
        backbone: The frozen model.
        prompts: What the images show.
        steps: Of sampling.
        guidance: Scale of guidance, by an empty negative prompt unless the network embeds it.
        seed: Of the initial noise.
        inputs: Further inputs of the network, by its latents (those of the negative prompt first)
            and the step.
    """
    schedule = backbone.schedule(steps)
    conditioning = backbone.embed([*[""] * len(prompts), *prompts])
    if embedded := "guidance" in conditioning:
        conditioning["guidance"][:] = guidance
    size = backbone.size
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(prompts), backbone.latent_channels, size, size, generator=generator)
    x = x.to(backbone.device)
    for i, t in enumerate(schedule.timesteps):
        both = torch.cat([x, x])
        extra = {} if inputs is None else inputs(both, i)
        negative, prompt = backbone.predict(both, t, conditioning, **extra).chunk(2)
        x = schedule.step(prompt if embedded else guide(negative, prompt, guidance), x, i)
    return backbone.decode(x)
