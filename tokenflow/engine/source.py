"""The way from a clip's frames to their noise trajectory, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter

import torch
from torch import Tensor

from tokenflow.diffusion import Backbone, Schedule, Trajectory
from tokenflow.diffusion.inversion import Noise, inversion_steps
from tokenflow.diffusion.sampling import require_finite
from tokenflow.editors import Editor, Pass
from tokenflow.engine.denoising import predicted
from tokenflow.engine.guard import guarded
from tokenflow.engine.ranks.group import FrameGroup
from tokenflow.engine.resume import KeptInversion, Recall
from tokenflow.video import Clip

Progress = Callable[[str, int, int], None]


def invert_clip(
    backbone: Backbone,
    clip: Clip,
    noise: Noise,
    schedule: Schedule,
    timesteps: tuple[int, ...],
    batch: int,
    kept: KeptInversion,
    group: FrameGroup,
    seconds: dict[str, float],
    progress: Progress,
) -> Trajectory:
    """Encodes and inverts this rank's frames, but for those that are kept from before."""
    channels, scale = backbone.unet.config.in_channels, backbone.latent_scale
    height, width = clip.frames.shape[-2:]
    clean = torch.empty(len(clip), channels, height // scale, width // scale)
    trajectory = Trajectory.empty(clean, schedule, timesteps, clip.first, clip.total)
    parts = list(torch.arange(len(clip)).split(batch))
    with group.together():
        missing = []
        for part in parts:
            group.heed()
            if not kept.fill(trajectory, part):
                missing.append(part)
        if found := len(parts) - len(missing):
            progress("recall", found, len(parts))
    for number, part in enumerate(group.rounds(missing)):
        with timed(seconds, "encode"), group.together():
            if part is not None:
                clean[part] = backbone.encode(clip.frames[part]).cpu()
                require_finite(clean[part], "the encoded frames")
                progress("encode", number + 1, len(missing))
        group.leave()
        with timed(seconds, "invert"):
            walk = None
            if part is not None:
                frames, here = (part + clip.first).tolist(), clean[part].to(backbone.device)
                walk = inversion_steps(noise, here, frames, schedule, timesteps)
            for step, t in enumerate(timesteps, start=1):
                with group.together():
                    if part is not None and walk is not None:
                        trajectory.keep(t, part, next(walk))
                        done = number * len(timesteps) + step
                        progress("invert", done, len(missing) * len(timesteps))
                group.leave()
            if part is not None:
                kept.keep(trajectory, part)
    return trajectory


def conditioned_noise(editor: Editor, backbone: Backbone, prompt: str, schedule: Schedule) -> Noise:
    """The model's noise of what the source shows, with what the editor gives the UNet for it."""
    embedding = backbone.embed([prompt])

    def noise(frames: list[int], latents: Tensor, t: int) -> Tensor:
        share = schedule.share(t)
        forward = Pass(("source",), tuple(frames), latents[None], embedding, t, share)
        return predicted(editor, backbone, forward, schedule)[0]

    return noise


def kept_inversion(
    backbone: Backbone,
    clip: Clip,
    editor: Editor,
    prompt: str,
    schedule: Schedule,
    timesteps: tuple[int, ...],
    recall: Recall | None,
    each: Callable[[], None],
) -> KeptInversion:
    """Where the clip's inversion is kept; an editor with an influence on it is part of its key.

    The editor must have been prepared for the clip; `each` is called now and then.
    """
    influential = editor.conditions_source
    if recall is None or (influential and recall.editor is None):
        return KeptInversion(None, clip)
    content = []
    for position in clip.positions:
        content.append(guarded(editor, editor.content)(position))
        each()
    influence = recall.editor if influential else None
    parts = backbone.fingerprint, prompt, schedule.timesteps, timesteps, influence
    return KeptInversion(recall.cache, clip, parts, content, influential, each)


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Adds how long a block took to a stage's time."""
    begin = perf_counter()
    yield
    seconds[stage] = round(seconds.get(stage, 0.0) + perf_counter() - begin, 3)
