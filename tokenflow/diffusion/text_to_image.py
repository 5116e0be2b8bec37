"""Text to image: one sampling loop by DDIM with guidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tokenflow.diffusion.backbone import Backbone
from tokenflow.diffusion.sampling import ddim_step, guide


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
        steps: DDIM steps.
        guidance: Scale of classifier-free guidance; the negative prompt is empty.
        seed: Of the initial noise.
        inputs: Further arguments of the UNet, by its latents (those of the negative prompt first)
            and the timestep.
    """
    schedule = backbone.schedule(steps)
    embeddings = torch.cat([backbone.embed([""] * len(prompts)), backbone.embed(prompts)])
    size = backbone.unet.config.sample_size
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(prompts), 4, size, size, generator=generator).to(backbone.device)
    for t in schedule.timesteps:
        both = torch.cat([x, x])
        extra = {} if inputs is None else inputs(both, t)
        negative, prompt = backbone.epsilon(both, t, embeddings, schedule, **extra).chunk(2)
        epsilon = guide(negative, prompt, guidance)
        x = ddim_step(x, epsilon, schedule.alpha(t), schedule.alpha(schedule.following(t)))
    return backbone.decode(x)
