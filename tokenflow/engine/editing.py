"""The method: `edit_latents` over plain tensors, and `edit_clip` from frames to frames."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor

from tokenflow.contract import require_none
from tokenflow.diffusion import Backbone, Schedule, Trajectory, reconstruct
from tokenflow.diffusion.inversion import inversion_timesteps
from tokenflow.diffusion.sampling import ddim_step, require_finite
from tokenflow.editors import Editor, contract
from tokenflow.engine.denoising import Denoiser
from tokenflow.engine.guard import guarded, named
from tokenflow.engine.keyframes import draw_keyframes, neighbourhood, split_windows
from tokenflow.engine.probe import Observer
from tokenflow.engine.ranks.group import FrameGroup
from tokenflow.engine.ranks.shard import Share
from tokenflow.engine.resume import KeptSampling, Recall, sampling_of
from tokenflow.engine.settings import Settings
from tokenflow.engine.source import Progress, conditioned_noise, invert_clip, kept_inversion, timed
from tokenflow.engine.spans import spans
from tokenflow.errors import InputError
from tokenflow.metrics import decibels
from tokenflow.propagation import ClipFlow, Propagation
from tokenflow.video import Clip, Frames, Spool


@dataclass(frozen=True)
class Result:
    """An edited clip and its latents, seconds for each stage, and the inversion's quality if asked.

    `round_trip_psnr` is the VAE's alone, `reconstruction_psnr` that of inverting and sampling
    back, both in dB against the source frames. What is `kept` of the sampling is to be forgotten
    when the result has been written.
    """

    source: Clip
    clip: Clip
    latents: Float[Tensor, "frames c h w"]
    seed: int
    seconds: dict[str, float]
    reconstruction_psnr: float | None = None
    round_trip_psnr: float | None = None
    kept: KeptSampling | None = None


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
    recall: Recall | None = None,
    observer: Observer | None = None,
) -> Result:
    """Edits every frame of a clip: encode, invert, sample with TokenFlow, decode.

    Where several ranks share the clip, each calls this with the same arguments, and its result is
    of the frames of its own windows.

    Args:
        backbone: The frozen model.
        clip: What to edit; sides must be multiples of `backbone.multiple`. Of a shared clip, the
            frames that are `needed` are enough.
        prompt: What the edit shows.
        editor: The image editing method for keyframes.
        propagation: The kernel that finds correspondences.
        negative_prompt: What the edit does not show.
        inversion_prompt: What the source shows.
        settings: Everything else; the paper's when not given.
        report_reconstruction: Also sample back without an edit and report the PSNR.
        progress: Called as (stage, step done, steps) with stages encode, invert, edit, decode.
        group: The ranks that share the clip; this process alone when not given.
        recall: Where inversions and interrupted samplings are kept and found; nowhere when not
            given.
        observer: Sees what one site does at one step.

    Raises:
        InputError: An argument is out of its range; the message says which and what to do.
        DivergedError: A latent became NaN or infinite.
        Preempted: A rank of the group was asked to stop.

    Example:
        >>> result = edit_clip(backbone, clip, "a blue ball on sand", PnP(), NNField())
    """
    settings, group = settings or Settings(), group or FrameGroup()
    seconds: dict[str, float] = {}
    quality: dict[str, float] = {}
    share = group.share(split_windows(clip.total, settings.keyframe_every))
    seen, clip = clip.part(needed(share, settings, editor)), clip.part(share.positions(share.own))
    flow = None
    provider = propagation.flow if settings.consistency == "tokenflow" else None
    with group.together():
        check(backbone, clip, prompt)
        schedule = backbone.schedule(settings.steps)
        inversion_steps = settings.inversion_steps or settings.steps
        timesteps = inversion_timesteps(inversion_steps, schedule, backbone)
        shown = seen if conditions_all(settings, editor) else clip
        guarded(editor, editor.prepare)(backbone, shown)
        if provider is not None:
            near = seen.part(share.positions(share.held))
            flow = guarded(provider, ClipFlow)(near, provider, backbone.latent_scale)
        noise = conditioned_noise(editor, backbone, inversion_prompt, schedule)
        known = kept_inversion(
            backbone, clip, editor, inversion_prompt, schedule, timesteps, recall, group.heed
        )
    group.leave()
    trajectory = invert_clip(
        backbone, clip, noise, schedule, timesteps, settings.batch, known, group, seconds, progress
    )
    if report_reconstruction:
        with timed(seconds, "reconstruct"):
            count = counter("reconstruct", settings.steps, progress)

            def between() -> None:
                count()
                group.step()

            with group.together():
                back = reconstruct(backbone, noise, trajectory, schedule, settings.batch, between)
            codes_by_name = {"reconstruction_psnr": back, "round_trip_psnr": trajectory.clean}
            for name, codes in codes_by_name.items():
                with group.together():
                    error = decoding_error(backbone, codes, clip, settings.batch, group.heed)
                quality[name] = decibels(group.mean(error, 0 if share.idle else len(clip)))
    kept = None
    if recall is not None and recall.editor is not None and recall.propagation is not None:
        prompts = prompt, negative_prompt, inversion_prompt
        sampling = sampling_of(backbone, recall, settings, *prompts)
        kept = KeptSampling(recall, clip, known.frames, share.frame_counts, group, sampling)
    with timed(seconds, "edit"):
        edited = edit_latents(
            backbone, trajectory, schedule, editor, propagation, prompt, negative_prompt,
            inversion_prompt, settings, clip.name, progress, flow, group, kept, observer,
        )  # fmt: skip
    with timed(seconds, "decode"):
        done = decoded(backbone, edited, clip, settings.batch, group, progress)
    return Result(clip, done, edited, settings.seed, seconds, **quality, kept=kept)


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
    kept: KeptSampling | None = None,
    observer: Observer | None = None,
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
    windows = split_windows(trajectory.total, s.keyframe_every)
    share = group.share(windows)
    around = partial(neighbourhood, neighbours=s.neighbours, blend=s.blend)
    with group.together():
        embeddings = backbone.embed([inversion_prompt, negative_prompt, prompt])
        denoiser = Denoiser(
            backbone, trajectory, schedule, editor, embeddings, s.guidance, s.batch, flow, group,
            share,
        )  # fmt: skip
        begin = guarded(editor, editor.start)(trajectory, schedule, s.seed)
        require_none(contract.of_start(begin, trajectory, schedule), f"{named(editor)} in start")
    steps = len(begin.timesteps)
    before, x = (kept and kept.load(begin.latents, steps)) or (0, begin.latents.clone())
    for done, t in enumerate(begin.timesteps[before:], start=before + 1):
        step = schedule.timesteps.index(t)
        if s.consistency == "none":
            epsilon = denoiser.per_frame(x, t)
        elif s.consistency == "joint":
            epsilon = denoiser.joint(x, t)
        else:
            drawn = draw_keyframes(windows, s.keyframes, s.seed, name, step)
            bounded = s.keyframe_attention == "windowed"
            runs = spans(len(windows), s.span, s.anchors, step) if bounded else None
            look = None
            if observer is not None:
                look = observer.during(done - 1, steps, trajectory.positions, backbone.unet)
            first = done == before + 1
            epsilon = denoiser.propagated(
                x, t, drawn, runs, propagation, around, check=first, look=look
            )
        t_next = schedule.following(t)
        x = ddim_step(x, epsilon, schedule.alpha(t), schedule.alpha(t_next))
        arrived = x
        with group.together():
            here = tuple(trajectory.positions)
            x = guarded(editor, editor.constrain)(x, here, t_next, trajectory)
            require_none(contract.of_constrain(x, arrived), f"{named(editor)} in constrain")
            require_finite(x, f"sampling at step {step} (timestep {t})")
            progress("edit", done, steps)
        if kept is not None:
            kept.keep(done, steps, x)
        group.leave()
    return x


def needed(share: Share, settings: Settings, editor: Editor) -> range:
    """The frames that a rank must see of the source: of its windows, and of one more at each side.

    All where it has to condition other ranks' keyframes.
    """
    if conditions_all(settings, editor):
        return range(share.windows[-1].stop)
    return share.positions(share.held)


def conditions_all(settings: Settings, editor: Editor) -> bool:
    """Whether an editor may be asked on each rank for conditioning of any of the clip's frames."""
    bounded = settings.consistency == "tokenflow" and settings.keyframe_attention == "windowed"
    return bounded and type(editor).conditioning is not Editor.conditioning


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


def decoded(
    backbone: Backbone,
    latents: Float[Tensor, "frames c h w"],
    source: Clip,
    batch: int,
    group: FrameGroup,
    progress: Progress,
) -> Clip:
    """The edited clip; its frames are where the source's are, in memory or not."""
    lazy = isinstance(source.frames, Frames)
    height, width = source.frames.shape[-2:]
    spool, parts = Spool((height, width)), []
    codes = latents.split(batch)
    for number, part in enumerate(group.rounds(codes), start=1):
        with group.together():
            if part is not None:
                frames = backbone.decode(part).cpu()
                require_finite(frames, "the decoded frames")
                if lazy:
                    spool.extend(frames)
                else:
                    parts.append(frames)
                progress("decode", number, len(codes))
        group.leave()
    return dataclasses.replace(source, frames=spool.frames if lazy else torch.cat(parts))


def decoding_error(
    backbone: Backbone,
    codes: Float[Tensor, "frames c h w"],
    clip: Clip,
    batch: int,
    each: Callable[[], None],
) -> float:
    """The mean squared difference of decoded latents to a clip's; `each` is called per batch."""
    error = 0.0
    for some in torch.arange(len(codes)).split(batch):
        each()
        error += float((backbone.decode(codes[some]).cpu() - clip.frames[some]).square().sum())
    return error / prod(clip.frames.shape)


def counter(stage: str, steps: int, progress: Progress) -> Callable[[], None]:
    """A function that counts its calls as a stage's steps."""
    count = itertools.count(1)
    return lambda: progress(stage, next(count), steps)
