"""Algorithm 1 of the paper, written out slowly, against `edit_latents`."""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from tokenflow.diffusion import StableDiffusion, Trajectory, invert
from tokenflow.editors import PnP, Prompts
from tokenflow.engine import Settings, edit_latents
from tokenflow.engine.keyframes import draw_keyframes, split_windows
from tokenflow.propagation import NNField

STEPS, FRAMES, EVERY, GUIDANCE = 4, 9, 2, 7.5
SOURCE, NEGATIVE, PROMPT = "a red ball on sand", "a green cube", "a blue ball on sand"

Spans = list[tuple[list[int], list[int]]]
Neighbours = Callable[[int, Sequence[int]], dict[int, float]]
WHOLE: list[Spans] = [[([0, 1, 2, 3, 4], [0, 1, 2, 3, 4])]] * 2
"""In even and in odd steps: windows, and the keyframes that attend to each other for them."""
BOUNDED: list[Spans] = [  # spans of 2 with 1 anchor, which is window 2's
    [([0, 1], [0, 1, 2]), ([2, 3], [1, 2, 3, 4]), ([4], [2, 3, 4])],
    [([0], [0, 1, 2]), ([1, 2], [0, 1, 2, 3]), ([3, 4], [2, 3, 4])],
]

# float32 through four steps, guided by 7.5, of latents up to 6; measured 2e-5, on another processor
# 1.02e-4 in one value
TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def trajectory(backbone: StableDiffusion) -> Trajectory:
    latents = torch.randn(FRAMES, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return invert(backbone, latents, SOURCE, backbone.schedule(STEPS), STEPS)


def edited(
    backbone: StableDiffusion, trajectory: Trajectory, editor: PnP, **settings: Any
) -> Tensor:
    return edit_latents(
        backbone, trajectory, backbone.schedule(STEPS), Prompts(PROMPT, NEGATIVE, SOURCE),
        editor, NNField(),
        Settings(steps=STEPS, guidance=GUIDANCE, keyframe_every=EVERY, batch=3, **settings),
    )  # fmt: skip


class SlowAttention:
    """Joint attention with whole attention matrices, then nearest neighbours frame by frame."""

    def __init__(self, injected: bool) -> None:
        self.injected = injected
        self.weights: list[dict[int, float]] | None = None

    def __call__(self, attn: Attention, x: Tensor, *_: Any, **__: Any) -> Tensor:
        if self.weights is None:
            self.tokens = x.chunk(3)[0]
            self.outputs = [self.joint(attn, *parts) for parts in self.branches(attn, x)]
            return torch.cat(self.outputs)
        source = nn.functional.normalize(x.chunk(3)[0], dim=-1)
        keys = nn.functional.normalize(self.tokens, dim=-1)
        result = []
        for outputs in self.outputs:
            for frame, weights in enumerate(self.weights):
                found = {k: (source[frame] @ keys[k].T).argmax(dim=-1) for k in weights}
                result.append(sum(w * outputs[k, found[k]] for k, w in weights.items()))
        return torch.stack(result)

    def branches(self, attn: Attention, x: Tensor) -> list[tuple[Tensor, Tensor, Tensor, bool]]:
        q, k, v = (list(project(x).chunk(3)) for project in (attn.to_q, attn.to_k, attn.to_v))
        if self.injected:
            q, k = [q[0]] * 3, [k[0]] * 3
        return [(q[b], k[b], v[b], b > 0) for b in range(3)]

    def joint(self, attn: Attention, q: Tensor, k: Tensor, v: Tensor, extended: bool) -> Tensor:
        result = torch.zeros_like(q)
        for frame in range(len(q)):
            keys = k.flatten(0, 1) if extended else k[frame]
            values = v.flatten(0, 1) if extended else v[frame]
            for part in torch.arange(q.shape[-1]).chunk(attn.heads):
                scores = q[frame][:, part] @ keys[:, part].T / math.sqrt(len(part))
                result[frame][:, part] = scores.softmax(-1) @ values[:, part]
        return attn.to_out[0](result)


def bracket(frame: int, keyframes: Sequence[int]) -> dict[int, float]:
    """The numbers of the keyframes around a frame, with their weights."""
    before = [k for k, at in enumerate(keyframes) if at <= frame]
    after = [k for k, at in enumerate(keyframes) if at >= frame]
    if not before or not after or before[-1] == after[0]:
        return {(before[-1:] or after[:1])[0]: 1.0}
    start, stop = keyframes[before[-1]], keyframes[after[0]]
    weight = 1 / (1 + math.exp(-(frame - start) / (stop - start)))
    return {before[-1]: 1 - weight, after[0]: weight}


def previous(frame: int, keyframes: Sequence[int]) -> dict[int, float]:
    """The numbers of a frame's window and of the window before, with their keyframes' weights."""
    centers = [1, 3, 5, 7, 8]
    own = frame // EVERY
    if own == 0:
        return {0: 1.0}
    to_own, to_previous = abs(frame - centers[own]), abs(frame - centers[own - 1])
    weight = 1 / (1 + math.exp(-to_previous / (to_own + to_previous)))
    return {own - 1: 1 - weight, own: weight}


def slowly_edited(
    backbone: StableDiffusion,
    trajectory: Trajectory,
    features: int,
    attention: int,
    joint: bool,
    spans: list[Spans],
    neighbours: Neighbours,
) -> Tensor:
    """Edits with features and attention injected in the first so many steps."""
    unet, text = backbone.unet, backbone.embed([SOURCE, NEGATIVE, PROMPT])["embeddings"]
    scheduler = DDIMScheduler.from_config(backbone.scheduler.config)
    scheduler.set_timesteps(STEPS)
    before = dict(unet.attn_processors)
    x = trajectory.at(0)

    def noise(frames: list[int], t: int, step: int) -> Tensor:
        batch = torch.cat([trajectory.at(step)[frames], x[frames], x[frames]])
        hidden = text.repeat_interleave(len(frames), dim=0)
        return unet(batch, t, encoder_hidden_states=hidden).sample

    for step, t in enumerate(scheduler.timesteps.tolist()):
        sites: dict[str, Any] = {}
        with ExitStack() as stack:
            for name in before:
                if name.endswith("attn1.processor"):
                    # the tiny decoder's self-attentions all lie behind its first third
                    late = name.startswith("up_blocks")
                    sites[name] = SlowAttention(late and step < attention)
            unet.set_attn_processor({**before, **sites})
            stack.callback(unet.set_attn_processor, before.copy())
            if step < features:
                inject = (
                    unet.up_blocks[1]
                    .resnets[0]
                    .conv2.register_forward_hook(lambda m, i, out: torch.cat([out.chunk(3)[0]] * 3))
                )
                stack.enter_context(inject)
            windows = split_windows(FRAMES, EVERY)
            drawn = draw_keyframes(windows, "random", 0, "clip", step)
            if joint:
                output = noise(list(range(FRAMES)), t, step)
            else:
                parts = []
                for here, seen in spans[step % 2]:
                    for site in sites.values():
                        site.weights = None
                    noise([drawn[k] for k in seen], t, step)
                    frames = [frame for number in here for frame in windows[number]]
                    around = [neighbours(frame, drawn) for frame in frames]
                    for site in sites.values():
                        site.weights = [{seen.index(k): w for k, w in a.items()} for a in around]
                    parts.append(noise(frames, t, step).unflatten(0, (3, -1)))
                output = torch.cat(parts, dim=1).flatten(0, 1)
        _, negative, prompt = output.chunk(3)
        x = scheduler.step(negative + GUIDANCE * (prompt - negative), t, x).prev_sample
    return x


@torch.no_grad()
@pytest.mark.parametrize(("features", "attention"), [(0, 0), (3, 2)])
@pytest.mark.parametrize(
    ("settings", "spans"),
    [
        ({"keyframe_attention": "full"}, WHOLE),
        ({"keyframe_attention": "full", "neighbours": "previous"}, WHOLE),
        ({"keyframe_attention": "windowed", "span": 2, "anchors": 1}, BOUNDED),
        ({"consistency": "joint"}, WHOLE),
    ],
)
def test_agrees_with_the_algorithm_written_out_slowly(
    backbone: StableDiffusion,
    trajectory: Trajectory,
    settings: Any,
    spans: list[Spans],
    features: int,
    attention: int,
) -> None:
    editor = PnP(features=features / STEPS, attention=attention / STEPS)
    result = edited(backbone, trajectory, editor, **settings)
    joint = settings.get("consistency") == "joint"
    around = previous if settings.get("neighbours") == "previous" else bracket
    expected = slowly_edited(backbone, trajectory, features, attention, joint, spans, around)
    assert torch.allclose(result, expected, rtol=0, atol=TOLERANCE)


def test_frames_on_their_own_are_what_diffusers_pipeline_makes(
    backbone: StableDiffusion, trajectory: Trajectory
) -> None:
    editor = PnP(features=0.0, attention=0.0)
    result = edited(backbone, trajectory, editor, consistency="none")
    parts = {name: getattr(backbone, name) for name in StableDiffusion.components}
    pipeline = StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        [PROMPT] * FRAMES, negative_prompt=[NEGATIVE] * FRAMES,
        height=16, width=16, num_inference_steps=STEPS, guidance_scale=GUIDANCE,
        latents=trajectory.latents[0].clone(), output_type="latent",
    ).images  # fmt: skip
    assert torch.allclose(result, expected, rtol=0, atol=TOLERANCE)
