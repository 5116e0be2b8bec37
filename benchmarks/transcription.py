"""TokenFlow with Plug-and-Play as the papers write it, for benchmarks to compare with.

Geyer et al. 2023 (arXiv 2307.10373), section 4, and Tumanyan et al. 2023 (arXiv 2211.12572), for a
UNet of diffusers, with no thought of speed: three branches in every pass, attention by an explicit
softmax, whole matrices of similarities, one gather for each neighbour. Nothing of tokenflow's
engine is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

BRANCHES = 3
"""The source, the negative prompt and the prompt, in this order."""


@dataclass(frozen=True)
class PlugAndPlay:
    """Injection thresholds, shares of the steps, and how many layers take features."""

    attention: float = 0.5
    features: float = 0.8
    feature_layers: int = 1


@dataclass(frozen=True)
class Neighbours:
    """Of every frame in a pass: two keyframes, by number, and the later one's weight."""

    earlier: Int[Tensor, " frames"]
    later: Int[Tensor, " frames"]
    weight: Float[Tensor, " frames"]


@dataclass
class Pass:
    """What the layers have to know of the pass that runs.

    Attributes:
        inject_attention: Whether PnP's queries and keys are injected.
        inject_features: Whether its features are.
        neighbours: Of the frames; None in the pass of the keyframes.
    """

    inject_attention: bool = False
    inject_features: bool = False
    neighbours: Neighbours | None = None


class SelfAttention:
    """A self-attention's processor: joint over the keyframes, then propagated from them.

    Args:
        running: The pass that runs.
        injected: Whether PnP injects queries and keys here.
    """

    def __init__(self, running: Pass, injected: bool) -> None:
        self.running, self.injected = running, injected

    def __call__(self, layer: Attention, tokens: Tensor, *_: object, **__: object) -> Tensor:
        tokens = tokens.unflatten(0, (BRANCHES, -1))
        near = self.running.neighbours
        if near is None:
            self.source, self.outputs = tokens[0], self.joint(layer, tokens)
            return self.outputs.flatten(0, 1)
        earlier, later = (self.outputs_at(tokens[0], k) for k in (near.earlier, near.later))
        weight = near.weight[:, None, None]
        return ((1 - weight) * earlier + weight * later).flatten(0, 1)

    def joint(
        self, layer: Attention, tokens: Float[Tensor, "branches frames tokens channels"]
    ) -> Float[Tensor, "branches frames tokens channels"]:
        """Equation 3: edited branches attend to all keyframes, the source to each on its own."""
        q, k, v = layer.to_q(tokens), layer.to_k(tokens), layer.to_v(tokens)
        if self.injected and self.running.inject_attention:
            q[1:], k[1:] = q[0], k[0]
        heads = []
        for head in torch.arange(q.shape[-1]).chunk(layer.heads):
            q_, k_, v_ = q[..., head], k[..., head], v[..., head]
            branches = [attend(q_[0], k_[0], v_[0])]
            for b in range(1, BRANCHES):
                branches.append(attend(q_[b], k_[b].flatten(0, 1), v_[b].flatten(0, 1)))
            heads.append(torch.stack(branches))
        return layer.to_out[0](torch.cat(heads, dim=-1))

    def outputs_at(
        self, source: Float[Tensor, "frames tokens channels"], keyframe: Int[Tensor, " frames"]
    ) -> Float[Tensor, "branches frames tokens channels"]:
        """Equation 5: the keyframes' outputs where their source tokens are the most similar."""
        found = nearest(source, self.source[keyframe])
        return self.outputs[:, keyframe[:, None], found]


def attend(
    q: Float[Tensor, "frames queries width"], k: Float[Tensor, "*any keys width"], v: Tensor
) -> Float[Tensor, "frames queries width"]:
    """Attention of one head."""
    return (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(dim=-1) @ v


def nearest(
    tokens: Float[Tensor, "frames tokens channels"], keys: Float[Tensor, "frames keys channels"]
) -> Int[Tensor, "frames tokens"]:
    """Each token's nearest neighbour by cosine similarity."""
    similarity = normalize(tokens, dim=-1) @ normalize(keys, dim=-1).transpose(1, 2)
    return similarity.argmax(dim=-1)


def neighbours(frames: Sequence[int], keyframes: Sequence[int]) -> Neighbours:
    """Equation 6: the keyframes around each frame, weighted by a sigmoid of its distances."""
    rows = []
    for frame in frames:
        before = [k for k, at in enumerate(keyframes) if at <= frame]
        after = [k for k, at in enumerate(keyframes) if at >= frame]
        earlier, later = (before[-1:] or after[:1])[0], (after[:1] or before[-1:])[0]
        back, ahead = abs(frame - keyframes[earlier]), abs(frame - keyframes[later])
        share = back / (back + ahead) if earlier != later else 0.0
        rows.append((earlier, later, 1 / (1 + math.exp(-share))))
    earlier, later, weight = zip(*rows, strict=True)
    return Neighbours(torch.tensor(earlier), torch.tensor(later), torch.tensor(weight))


def decoder(unet: UNet2DConditionModel) -> list[tuple[torch.nn.Module, str]]:
    """PnP's layers of the decoder, from a third of the way up: residual blocks, and the names that
    the processors of the attentions beside them begin with (none begins with what is no name).
    """
    layers = []
    for b, block in enumerate(unet.up_blocks):
        names = [f"up_blocks.{b}.attentions.{i}." for i in range(len(block.resnets))]
        layers += zip(block.resnets, names, strict=True)
    return layers[len(layers) // 3 :]


@torch.no_grad()
def edit(
    unet: UNet2DConditionModel,
    scheduler: DDIMScheduler,
    text: Float[Tensor, "branches words width"],
    source: Float[Tensor, "steps frames c h w"],
    keyframes: Callable[[int], Sequence[int]],
    every: int,
    guidance: float,
    pnp: PlugAndPlay,
) -> Float[Tensor, "frames c h w"]:
    """The edited latents of a clip (Algorithm 1).

    Args:
        unet: The frozen network.
        scheduler: DDIM, with as many timesteps set as there are steps.
        text: The prompts' embeddings.
        source: The source's inverted latents, noisiest first.
        keyframes: The frames that are drawn in a step, one from each window.
        every: Frames in a window.
        guidance: Scale of classifier-free guidance.
        pnp: What is injected, and when.
    """
    steps, frames = source.shape[:2]
    windows = [range(i, min(i + every, frames)) for i in range(0, frames, every)]
    running, layers, before = Pass(), decoder(unet), unet.attn_processors
    self_attention = {
        name: SelfAttention(running, name.startswith(tuple(prefix for _, prefix in layers)))
        for name in before
        if name.endswith("attn1.processor")
    }

    def inject_features(_: object, __: object, output: Tensor) -> Tensor:
        if not running.inject_features:
            return output
        return output.chunk(BRANCHES)[0].repeat(BRANCHES, 1, 1, 1)

    hooks = [
        resnet.conv2.register_forward_hook(inject_features)
        for resnet, _ in layers[: pnp.feature_layers]
    ]
    unet.set_attn_processor({**before, **self_attention})
    try:
        x = source[0]
        for i, t in enumerate(scheduler.timesteps):
            running.inject_attention = i < int(steps * pnp.attention)
            running.inject_features = i < int(steps * pnp.features)

            def noise(
                some: Sequence[int], x: Tensor = x, i: int = i, t: Tensor = t
            ) -> Float[Tensor, "branches frames c h w"]:
                here = list(some)
                batch = torch.cat([source[i][here], x[here], x[here]])
                hidden = text.repeat_interleave(len(here), dim=0)
                output = unet(batch, t, encoder_hidden_states=hidden).sample
                return output.unflatten(0, (BRANCHES, -1))

            drawn = keyframes(i)
            running.neighbours = None
            noise(drawn)
            parts = []
            for window in windows:
                running.neighbours = neighbours(window, drawn)
                parts.append(noise(window))
            _, negative, prompt = torch.cat(parts, dim=1)
            guided = negative + guidance * (prompt - negative)
            x = scheduler.step(guided, t, x).prev_sample
        return x
    finally:
        unet.set_attn_processor(before)
        for hook in hooks:
            hook.remove()
