"""How much structure a control gives: accuracy of samples whose prompts omit the shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokenflow.diffusion import Backbone
from tokenflow.diffusion.text_to_image import text_to_image
from tokenflow.editors import Batch, Editor
from tokenflow.miniature.judge import Judge, answers
from tokenflow.miniature.scenes import Scene, random_scene
from tokenflow.video import Clip
from training.stills import without_shape

FIRST_SEED = 4_000_000
# looks whose object stands out from the background by colour
LOOKS = (
    {"pattern": "plain", "color": "purple", "background": "sand"},
    {"pattern": "plain", "color": "yellow", "background": "water"},
    {"pattern": "plain", "color": "red", "background": "snow"},
    {"pattern": "plain", "color": "white", "background": "grass"},
)
SHAPE_BAR, OVERLAP_BAR = 0.80, 0.60


@dataclass(frozen=True)
class ControlAccuracy:
    """Means over samples: `shape` is the share of shapes judged right, `overlap` the IoU of the
    object's mask with the source's."""

    shape: float
    overlap: float


def judge_control(
    backbone: Backbone,
    editor: Editor,
    judge: Judge,
    each: int,
    steps: int = 50,
    guidance: float = 3.0,
) -> ControlAccuracy:
    """Samples from noise under the editor's control by `each` held-out stills for every look."""
    shapes, overlaps = [], []
    for number, look in enumerate(LOOKS):
        seed = FIRST_SEED + number * each
        scenes = [random_scene(seed + i) for i in range(each)]
        wanted = [scene.with_attributes(**look) for scene in scenes]
        stills = Clip.from_frames(torch.stack([scene.frame(0) for scene in scenes]))
        prompt = without_shape(wanted[0].attributes)
        inputs = control(backbone, editor, stills, prompt, steps)
        prompts = [prompt] * each
        samples = text_to_image(backbone, prompts, steps, guidance, seed, inputs).cpu()
        right = answers(judge, samples, [scene.attributes for scene in wanted])["shape"]
        shapes += right.tolist()
        overlaps += [overlap(image, scene) for image, scene in zip(samples, wanted, strict=True)]
    return ControlAccuracy(mean(map(float, shapes)), mean(overlaps))


def control(
    backbone: Backbone, editor: Editor, clip: Clip, prompt: str, steps: int
) -> Callable[[Tensor, int], dict[str, Any]]:
    """What an editor that is prepared for a clip gives the network, one image for each frame."""
    editor.prepare(backbone, clip)
    schedule, frames = backbone.schedule(steps), tuple(clip.positions)
    conditioning = backbone.embed(["", prompt]).per_frame(len(frames))

    def inputs(latents: Tensor, step: int) -> dict[str, Any]:
        both, t = latents.unflatten(0, (2, -1)), schedule.timesteps[step]
        names = ("negative", "prompt")
        return editor.model_inputs(Batch(names, frames, both, conditioning, t, step, steps))

    return inputs


def overlap(image: Float[Tensor, "3 h w"], wanted: Scene, frame: int = 0) -> float:
    """IoU of the object in an image and in one frame of a scene that shows what it should."""
    true = wanted.mask(frame, image.shape[-1]) > 0.5
    found = object_mask(image, wanted.frame(frame, image.shape[-1]), true)
    return float((found & true).sum() / (found | true).sum())


def object_mask(
    image: Float[Tensor, "3 h w"], truth: Float[Tensor, "3 h w"], mask: Bool[Tensor, "h w"]
) -> Bool[Tensor, "h w"]:
    """Pixels nearer to the object's mean colour than to the background's, as `truth` has them."""
    to_object, to_background = (
        (image - truth[:, part].mean(dim=1)[:, None, None]).square().sum(dim=0)
        for part in (mask, ~mask)
    )
    return to_object < to_background
