"""The method: `edit_latents` over plain tensors, and `edit_clip` from frames to frames."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from tokenflow.contract import require_none
from tokenflow.diffusion import Backbone, Schedule, Trajectory, invert, reconstruct
from tokenflow.diffusion.sampling import ddim_step, require_finite
from tokenflow.editors import Editor, Pass, contract
from tokenflow.engine.denoising import Denoiser, conditioned
from tokenflow.engine.frame_group import FrameGroup
from tokenflow.engine.guard import guarded, named
from tokenflow.engine.windows import (
    Blend,
    Keyframes,
    Neighbours,
    draw_keyframes,
    neighbourhood,
    split_windows,
)
from tokenflow.errors import InputError
from tokenflow.metrics import decibels
from tokenflow.propagation import ClipFlow, Propagation
from tokenflow.video import Clip

Consistency = Literal["tokenflow", "joint", "none"]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Settings:
    """How a clip is edited; the defaults are the paper's.

    Args:
        steps: Sampling steps.
        inversion_steps: Inversion steps, at least as many; as many as sampling when not given.
        guidance: Scale of classifier-free guidance.
        keyframe_every: Frames in a window; one keyframe is drawn from each.
        keyframes: How it is drawn: "random", "center", "first", or a fixed offset.
        neighbours: Which keyframes a frame takes its features from: "bracketing" (paper) or
            "previous" (published code).
        blend: Their weights over time: "sigmoid" (paper) or "linear".
        consistency: "tokenflow"; "joint" lets all frames attend to each other and propagates
            nothing; "none" edits every frame on its own.
        seed: Of everything random.
        batch: Frames in one forward pass; changes memory and speed, not the result. The keyframes
            of a joint pass, and all frames where consistency is "joint", go through at once.
    """

    steps: int = 50
    inversion_steps: int | None = None
    guidance: float = 7.5
    keyframe_every: int = 8
    keyframes: Keyframes = "random"
    neighbours: Neighbours = "bracketing"
    blend: Blend = "sigmoid"
    consistency: Consistency = "tokenflow"
    seed: int = 0
    batch: int = 8

    def __post_init__(self) -> None:
        names = {"neighbours": Neighbours, "blend": Blend, "consistency": Consistency}
        for name, kind in names.items():
            if getattr(self, name) not in get_args(kind):
                raise InputError(
                    f"{name} must be one of {get_args(kind)}, got {getattr(self, name)!r}"
                )
        draw_keyframes([range(1)], self.keyframes, self.seed, "", 0)  # refuses unknown policies
        for name in ("steps", "keyframe_every", "batch"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.inversion_steps is not None and self.inversion_steps < self.steps:
            raise InputError(
                f"inversion needs at least as many steps as sampling: got inversion_steps "
                f"{self.inversion_steps} for steps {self.steps}; raise the one or lower the other"
            )


@dataclass(frozen=True)
class Result:
    """An edited clip, with seconds for each stage and, if asked for, the inversion's quality.

    `round_trip_psnr` is the VAE's alone, `reconstruction_psnr` that of inverting and sampling
    back, both in dB against the source frames.
    """

    source: Clip
    clip: Clip
    seed: int
    seconds: dict[str, float]
    reconstruction_psnr: float | None = None
    round_trip_psnr: float | None = None


@torch.no_grad()
def edit_clip(
    backbone: Backbone,
    clip: Clip,
    prompt: str,
    editor: Editor,
    propagation: Propagation,
    *,
    negative_prompt: str = "",
    inversion_prompt: str = "",
    settings: Settings | None = None,
    report_reconstruction: bool = False,
    progress: Progress = lambda stage, step, steps: None,
    group: FrameGroup | None = None,
) -> Result:
    """Edits every frame of a clip: encode, invert, sample with TokenFlow, decode.

    Where several ranks share the clip, each calls this with the same arguments, and its result is
    of the frames of its own windows.

    Args:
        backbone: The frozen model.
        clip: What to edit; sides must be multiples of `backbone.multiple`. Of a shared clip, the
            frames of the rank's own windows and of one more at each side are enough.
        prompt: What the edit shows.
        editor: The image editing method for keyframes.
        propagation: The kernel that finds correspondences.
        negative_prompt: What the edit does not show.
        inversion_prompt: What the source shows.
        settings: Everything else; the paper's when not given.
        report_reconstruction: Also sample back without an edit and report the PSNR.
        progress: Called as (stage, step done, steps) with stages encode, invert, edit, decode.
        group: The ranks that share the clip; this process alone when not given.

    Raises:
        InputError: An argument is out of its range; the message says which and what to do.
        DivergedError: A latent became NaN or infinite.

    Example:
        >>> result = edit_clip(backbone, clip, "a blue ball on sand", PnP(), NNField())
    """
    settings, group = settings or Settings(), group or FrameGroup()
    check(backbone, clip, prompt)
    schedule = backbone.schedule(settings.steps)
    seconds: dict[str, float] = {}
    quality: dict[str, float] = {}
    inversion_steps = settings.inversion_steps or settings.steps
    share = group.share(split_windows(clip.total, settings.keyframe_every))
    seen, clip = clip, clip.part(share.positions(share.own))
    flow = None
    provider = propagation.flow if settings.consistency == "tokenflow" else None
    with group.together():
        guarded(editor, editor.prepare)(backbone, clip)
        if provider is not None:
            seen = seen.part(share.positions(share.held))
            flow = guarded(provider, ClipFlow)(seen, provider, backbone.latent_scale)
    embedding = backbone.embed([inversion_prompt])

    def conditioning(frames: list[int], here: Tensor, t: int) -> dict[str, Any]:
        source = Pass(("source",), tuple(frames), here[None], embedding, t, schedule.share(t))
        return conditioned(editor, backbone, source)

    with timed(seconds, "encode"), group.together():
        latents = in_batches(backbone.encode, clip.frames, settings.batch, "encode", progress)
        require_finite(latents, "the encoded frames")
    with timed(seconds, "invert"), group.together():
        trajectory = invert(
            backbone, latents, inversion_prompt, schedule, inversion_steps, settings.batch,
            counter("invert", inversion_steps, progress), conditioning, clip.first, clip.total,
        )  # fmt: skip
    if report_reconstruction:
        with timed(seconds, "reconstruct"):
            count = counter("reconstruct", settings.steps, progress)
            back = reconstruct(
                backbone,
                trajectory,
                inversion_prompt,
                schedule,
                settings.batch,
                count,
                conditioning,
            )
            for name, codes in (("reconstruction_psnr", back), ("round_trip_psnr", latents)):
                frames = in_batches(backbone.decode, codes, settings.batch)
                error = float((frames - clip.frames).square().mean())
                quality[name] = decibels(group.mean(error, 0 if share.idle else len(clip)))
    with timed(seconds, "edit"):
        edited = edit_latents(
            backbone, trajectory, schedule, editor, propagation,
            prompt, negative_prompt, inversion_prompt, settings, clip.name, progress, flow, group,
        )  # fmt: skip
    with timed(seconds, "decode"), group.together():
        frames = in_batches(backbone.decode, edited, settings.batch, "decode", progress)
        require_finite(frames, "the decoded frames")
    return Result(clip, dataclasses.replace(clip, frames=frames), settings.seed, seconds, **quality)


@torch.no_grad()
def edit_latents(
    backbone: Backbone,
    trajectory: Trajectory,
    schedule: Schedule,
    editor: Editor,
    propagation: Propagation,
    prompt: str,
    negative_prompt: str = "",
    inversion_prompt: str = "",
    settings: Settings | None = None,
    name: str = "clip",
    progress: Progress = lambda stage, step, steps: None,
    flow: ClipFlow | None = None,
    group: FrameGroup | None = None,
) -> Float[Tensor, "frames c h w"]:
    """Algorithm 1 of the paper: the edited latents of a trajectory's frames.

    The editor must have been prepared for the clip, and a kernel that needs optical flow must be
    given that of the source's frames. Of a clip that a `group` shares, each rank has the trajectory
    of its own windows.
    """
    s, group = settings or Settings(), group or FrameGroup()
    if s.consistency == "tokenflow" and propagation.flow is not None and flow is None:
        kernel, provider = type(propagation).__name__, type(propagation.flow).__name__
        raise InputError(
            f"{kernel} needs the clip's optical flow, got none; use edit_clip, or give "
            f"flow=ClipFlow(clip, kernel.flow, backbone.latent_scale), here by {provider}"
        )
    embeddings = backbone.embed([inversion_prompt, negative_prompt, prompt])
    windows = split_windows(trajectory.total, s.keyframe_every)
    share = group.share(windows)
    own, held = (slice(part.start, part.stop) for part in (share.own, share.held))
    denoiser = Denoiser(
        backbone, trajectory, schedule, editor, embeddings, s.guidance, s.batch, flow, group, share
    )
    with group.together():
        begin = guarded(editor, editor.start)(trajectory, schedule, s.seed)
        require_none(contract.of_start(begin, trajectory, schedule), f"{named(editor)} in start")
    x = begin.latents.clone()
    for done, t in enumerate(begin.timesteps, start=1):
        step = schedule.timesteps.index(t)
        if s.consistency == "none":
            epsilon = denoiser.per_frame(x, t)
        elif s.consistency == "joint":
            epsilon = denoiser.joint(x, t)
        else:
            drawn = draw_keyframes(windows, s.keyframes, s.seed, name, step)
            around = partial(
                neighbourhood, windows=windows[held], keyframes=drawn[held],
                neighbours=s.neighbours, blend=s.blend,
            )  # fmt: skip
            epsilon = denoiser.propagated(x, t, drawn[own], propagation, around, check=done == 1)
        t_next = schedule.following(t)
        x = ddim_step(x, epsilon, schedule.alpha(t), schedule.alpha(t_next))
        arrived = x
        with group.together():
            here = tuple(trajectory.positions)
            x = guarded(editor, editor.constrain)(x, here, t_next, trajectory)
            require_none(contract.of_constrain(x, arrived), f"{named(editor)} in constrain")
            require_finite(x, f"sampling at step {step} (timestep {t})")
        progress("edit", done, len(begin.timesteps))
    return x


def check(backbone: Backbone, clip: Clip, prompt: str) -> None:
    """Raises `InputError` for what would fail later, before any work is done."""
    check_prompt(prompt)
    height, width = clip.frames.shape[-2:]
    if height % backbone.multiple or width % backbone.multiple:
        raise InputError(
            f"the frames are {height}x{width}, expected multiples of {backbone.multiple} for this "
            f"model; read them with read_clip(..., multiple={backbone.multiple})"
        )


def check_prompt(prompt: str) -> None:
    """Raises `InputError` for an empty prompt."""
    if not prompt.strip():
        raise InputError("the prompt is empty; say what the edited video shows")


def in_batches(
    network: Callable[[Tensor], Tensor],
    items: Tensor,
    batch: int,
    stage: str = "",
    progress: Progress = lambda stage, step, steps: None,
) -> Tensor:
    """A network's output for `items`, `batch` at a time, gathered in host memory."""
    parts = items.split(batch)
    done = []
    for i, part in enumerate(parts, start=1):
        done.append(network(part).cpu())
        progress(stage, i, len(parts))
    return torch.cat(done)


def counter(stage: str, steps: int, progress: Progress) -> Callable[[], None]:
    """A function that counts its calls as a stage's steps."""
    count = itertools.count(1)
    return lambda: progress(stage, next(count), steps)


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Records how long a block took."""
    begin = perf_counter()
    yield
    seconds[stage] = round(perf_counter() - begin, 3)
