"""From frames to frames: encode, invert, sample by Algorithm 1, decode."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor

from tokenflow.diffusion import Backbone, Schedule, Trajectory, reconstruct
from tokenflow.diffusion.schedule import require_finite
from tokenflow.editors import Editor, Prompts
from tokenflow.engine.algorithm import WAYS, Consistency, Joint, PerFrame, sample
from tokenflow.engine.attention import Look, Matcher
from tokenflow.engine.automatic_mask import automatic_mask, require_comparable
from tokenflow.engine.checked import blamed, require_kinds
from tokenflow.engine.further_channels import further_channels, require_given
from tokenflow.engine.invert import (
    OnStep,
    cached_inversion,
    check_size,
    encode_clip,
    ignore,
    invert_parts,
    reported,
    source_output,
    timed,
)
from tokenflow.engine.keyframes import split_windows
from tokenflow.engine.network import EditedNetwork
from tokenflow.engine.ranks.group import FrameGroup
from tokenflow.engine.ranks.shard import WindowShard
from tokenflow.engine.recording import recorded, uses_features, with_features
from tokenflow.engine.region import AUTO, Automatic, Region
from tokenflow.engine.resume import ResumeStore, SamplingCheckpoint, sampling_key
from tokenflow.engine.sampling import Sampling
from tokenflow.engine.settings import Settings
from tokenflow.engine.source_cache import SourceCache, SourceFeatures, described
from tokenflow.errors import InputError
from tokenflow.metrics import decibels
from tokenflow.propagation import ClipFlow, LatentFlow, Propagation
from tokenflow.storage import digests
from tokenflow.video import Clip, FrameBuffer, Frames

OnPrediction = Callable[[int, Float[Tensor, "frames c h w"]], None]
"""Called after a step of sampling with the steps done and the clean latents that it predicts, in
host memory."""


@dataclass(frozen=True)
class Result:
    """An edited clip, its latents, the settings as they were used, and the seconds of each stage.

    If `Settings.report_reconstruction` is on, `round_trip_psnr` is the VAE's alone and
    `reconstruction_psnr` that of inverting and sampling back, both in dB against the source frames.
    The `checkpoint` of the sampling is to be removed when the result has been written. The `mask`
    is that of the whole clip where it was an automatic one.
    """

    source: Clip
    clip: Clip
    latents: Float[Tensor, "frames c h w"]
    settings: Settings
    seconds: dict[str, float]
    reconstruction_psnr: float | None = None
    round_trip_psnr: float | None = None
    checkpoint: SamplingCheckpoint | None = None
    mask: Clip | None = None


@torch.no_grad()
def edit_clip(
    model: Backbone,
    clip: Clip,
    prompts: str | Prompts,
    editor: Editor,
    propagation: Propagation,
    settings: Settings | None = None,
    *,
    mask: Clip | Automatic | None = None,
    depth: Clip | None = None,
    consistency: type[Consistency] | None = None,
    on_step: OnStep = ignore,
    on_prediction: OnPrediction | None = None,
    look: Look | None = None,
    store: ResumeStore | None = None,
    source_cache: SourceCache | None = None,
    ranks: FrameGroup | None = None,
) -> Result:
    """Edits every frame of a clip: encode, invert, sample with TokenFlow, decode.

    Where several ranks share the clip, each calls this with the same arguments, and its result is
    of the frames of its own windows.

    Args:
        model: The frozen model.
        clip: What to edit; sides must be multiples of `model.multiple`. Of a shared clip, the
            frames of `frames_needed` are enough.
        prompts: What the edit shows; with what it does not show, and what the source shows.
        editor: The image editing method for keyframes.
        propagation: The kernel that finds correspondences.
        settings: Everything else; the defaults of `Settings` when not given.
        mask: White where the edit may be, black where the source stays: of one frame, or of as many
            as the clip, in its size; "auto" is where the model's predictions for the source's
            prompt and the edit's differ. Everywhere when not given. Models for inpainting need it.
        depth: Of the clip's frames, as bright as near, for models that are given depth; of one
            frame, or of as many as the clip, in its size.
        consistency: A way of consistency in place of the one that the settings name.
        on_step: Called after every step; may ask to stop.
        on_prediction: Is shown the clean latents that each step of sampling predicts.
        look: Is shown every correspondence that the kernel finds, as `Probe` is.
        store: Where inversions, checkpoints and the source's features are cached; nowhere when not
            given.
        source_cache: Where the source's features are cached without a store: give the same one to
            several edits of a clip, and all but the first run without the source's branch.
        ranks: That share the clip; this process alone when not given.

    Raises:
        InputError: An argument is out of its range; the message names it and what to do.
        DivergedError: A latent became NaN or infinite.
        Preempted: `on_step` asked to stop, on one of the ranks.

    Example:
        >>> result = edit_clip(model, clip, "a blue ball on sand", PnP(), NNField())
    """
    settings, ranks = settings or Settings(), ranks or FrameGroup()
    require_kinds(editor, propagation, settings)
    settings = settings.for_model(model)
    prompts = Prompts(prompts) if isinstance(prompts, str) else prompts
    way = consistency or WAYS[settings.consistency]
    settings.require_used(editor, fuses=fuses(way), mask=mask)
    with blamed(editor, "check_steps"):
        editor.check_steps(settings.steps)
    require_given(model.further_channels, mask, depth)
    if automatic := not (mask is None or isinstance(mask, Clip)):
        require_comparable(mask, prompts)
    seconds: dict[str, float] = {}
    quality: dict[str, float] = {}
    shard = ranks.shard(split_windows(clip.total, settings.keyframe_every))
    seen, clip = clip.part(frames_needed(shard, settings, editor, way)), clip.part(shard.frames)
    region, found = None, None
    if isinstance(mask, Clip):
        region = region_of(mask, clip, model, settings, ranks)
    with ranks.together(), ranks.preemption.interruptible():
        check(model, clip, prompts)
    with timed(seconds, "encode"):
        channels = further_channels(model, clip, region, depth, settings.batch, ranks, shard)
    with ranks.together(), ranks.preemption.interruptible():
        height, width = (side // model.latent_scale for side in clip.frames.shape[-2:])
        schedule, inversion = schedules(model, settings, editor, (height, width))
        network = EditedNetwork(model, editor, prompts, channels.frames)
        network.editor.prepare(model, seen if sees_all(settings, editor, way) else clip)
        cached = cached_inversion(
            network, clip, schedule, inversion, settings.inversion_solver, store, channels.digests
        )
        near = seen.part(shard.positions(shard.halo))
        fused = fuses(way) and settings.fuses(editor)
        wanted, required = automatic or fused, automatic or settings.fusion is not None
        flow = flow_of(near, model, propagation, propagates(way), wanted, required)
        settings = settings.for_flow(fused and flow is not None)
        trajectory, missing = encode_clip(
            model, clip, schedule, inversion, settings.batch, cached, seconds, on_step
        )
    own_flow = None if propagation.flow is None else flow
    matcher = Matcher(propagation, trajectory.size, own_flow, look)
    checkpoint = None
    if store is not None and store.checkpoints:
        named = way.__module__, way.__qualname__, way.cache_key()
        key = sampling_key(model, store, settings, *dataclasses.astuple(prompts), *named)
        counts, frames = shard.frame_counts, cached.frames
        if region is not None:
            frames = list(map(digests.of_values, frames, region.digests))
        if automatic:  # its border is found again, and rounding may change that
            frames = [digests.of_values(frame, AUTO) for frame in frames]
        checkpoint = SamplingCheckpoint(store, clip, frames, counts, ranks, key)
    sampling = Sampling(
        network, trajectory, schedule, matcher, settings, clip.name, shard, ranks, near, flow,
        region=region,
    )  # fmt: skip
    kernel = described(propagation) if store is None else store.propagation
    if store is not None and store.source:
        source_cache = SourceCache(store.cache)
    keeps = uses_features(sampling, way)
    if inversion is not None and settings.record_source and keeps:
        sampling = recorded(
            sampling, way, source_cache, kernel, inversion, missing, cached, seconds, on_step
        )
    elif inversion is not None:
        with ranks.together(), ranks.preemption.interruptible():
            invert_parts(
                network, trajectory, missing, schedule, inversion, settings.inversion_solver,
                cached, seconds, on_step,
            )  # fmt: skip
    if automatic:
        with timed(seconds, "mask"):
            found = automatic_mask(sampling, prompts, on_step)
            region = region_of(found, clip, model, settings, ranks)
            sampling = dataclasses.replace(sampling, region=region)
    if source_cache and kernel and keeps and not sampling.features.recorded:
        writer = "" if checkpoint is None else checkpoint.key
        sampling = with_features(sampling, way, source_cache, kernel, writer)
    if settings.report_reconstruction:
        with timed(seconds, "reconstruct"):
            quality = inversion_quality(sampling, clip, on_step)
    with timed(seconds, "edit"):
        x, first = first_latents(sampling, checkpoint)
        shown = None if on_prediction is None else Predictions(sampling, x, on_prediction)
        after_step = EditSteps(ranks, checkpoint, len(schedule), on_step, sampling.features, shown)
        edited = sample(sampling, way, x, first, after_step)
    with timed(seconds, "decode"), ranks.together(), ranks.preemption.interruptible():
        done = decoded(model, edited, clip, settings.batch, on_step, region)
    return Result(
        clip, done, edited, settings, seconds, **quality, checkpoint=checkpoint, mask=found
    )


@torch.no_grad()
def edit_latents(
    model: Backbone,
    trajectory: Trajectory,
    schedule: Schedule,
    prompts: str | Prompts,
    editor: Editor,
    propagation: Propagation,
    settings: Settings | None = None,
    *,
    name: str = "clip",
    flow: ClipFlow | None = None,
    source_cache: SourceCache | None = None,
    ranks: FrameGroup | None = None,
    channels: Float[Tensor, "all d h w"] | None = None,
    x: Float[Tensor, "frames c h w"] | None = None,
    first: int = 0,
    last: int | None = None,
) -> Float[Tensor, "frames c h w"]:
    """Algorithm 1 of the paper: the edited latents of a trajectory's frames.

    The editor must have been prepared for the clip, and a kernel that needs optical flow must be
    given that of the source's frames. Predictions are fused where there is a flow, unless the
    settings say otherwise. Of a clip that `ranks` share, each has the trajectory of its
    own windows. Edits of the clip that share a `source_cache` run the source's branch only once.
    A model with `Backbone.further_channels` needs those of all the clip's frames, as `channels`.

    With `x`, the latents at level `first`, sampling begins there instead of at the editor's start;
    it ends at level `last`. So `first=i, last=i + 1` is one step.
    """
    settings, ranks = settings or Settings(), ranks or FrameGroup()
    require_kinds(editor, propagation, settings)
    settings = settings.for_model(model)
    prompts = Prompts(prompts) if isinstance(prompts, str) else prompts
    with blamed(editor, "check_steps"):
        editor.check_steps(settings.steps)
    way = WAYS[settings.consistency]
    settings.require_used(editor, fuses=fuses(way), mask=None)
    if propagates(way) and propagation.flow is not None and flow is None:
        kernel, provider = type(propagation).__name__, type(propagation.flow).__name__
        raise InputError(
            f"{kernel} needs the clip's optical flow, got none; use edit_clip, or give "
            f"flow=ClipFlow(clip, kernel.flow, model.latent_scale), here by {provider}"
        )
    if settings.fusion and fuses(way) and flow is None:
        raise InputError(
            "fusion needs the clip's optical flow, got none; give flow=LatentFlow("
            "clip, model.latent_scale), or use edit_clip"
        )
    settings = settings.for_flow(fuses(way) and settings.fuses(editor) and flow is not None)
    shard = ranks.shard(split_windows(trajectory.total, settings.keyframe_every))
    with ranks.together():
        network = EditedNetwork(model, editor, prompts, channels)
    matcher = Matcher(propagation, trajectory.size, None if propagation.flow is None else flow)
    sampling = Sampling(
        network, trajectory, schedule, matcher, settings, name, shard, ranks, flow=flow
    )
    kernel = described(propagation)
    if source_cache and kernel and uses_features(sampling, way):
        sampling = with_features(sampling, way, source_cache, kernel)
    if x is None:
        x, first = first_latents(sampling)
    return sample(sampling, way, x, first, last=last)


def first_latents(
    sampling: Sampling, checkpoint: SamplingCheckpoint | None = None
) -> tuple[Float[Tensor, "frames c h w"], int]:
    """Where sampling begins: the latents and the step of the editor's start, or a checkpoint's."""
    source = sampling.trajectory.source()
    with sampling.ranks.together():
        begin = sampling.network.editor.start(source, sampling.schedule, sampling.settings.seed)
    if checkpoint is not None:
        found = checkpoint.load(begin.latents, len(sampling.schedule))
        if found is not None:
            x, done, took = found
            sampling.features.took, sampling.features.alone = took, not took
            return x, done
    return begin.latents.clone(), begin.step


class Predictions:
    """Shows the clean latents on whose way each step of sampling led.

    Args:
        sampling: Of this rank's frames.
        x: Their latents before the first step.
        shown: Is called with the number of steps done and the clean latents.
    """

    def __init__(
        self, sampling: Sampling, x: Float[Tensor, "frames c h w"], shown: OnPrediction
    ) -> None:
        self.sampling, self.before, self.shown = sampling, x, shown

    def show(self, done: int, x: Float[Tensor, "frames c h w"]) -> None:
        """After a step; x are the latents that it led to."""
        step, schedule = self.sampling.step(done - 1), self.sampling.schedule
        if self.sampling.network.editor.clean_after(step):
            self.shown(done, x)
        elif schedule.leads(step.index):
            self.shown(done, schedule.clean(self.before, x, step.index))
        self.before = x


@dataclass(frozen=True)
class EditSteps:
    """What happens after a sampling step: report it, agree on stopping, write a checkpoint."""

    ranks: FrameGroup
    checkpoint: SamplingCheckpoint | None
    steps: int
    on_step: OnStep
    features: SourceFeatures
    predictions: Predictions | None = None

    def __call__(self, done: int, x: Float[Tensor, "frames c h w"]) -> bool:
        """Whether to stop, which all ranks do after the same step."""
        if self.predictions is not None:
            self.predictions.show(done, x)
        (stop,) = self.ranks.any(self.on_step("edit", done, self.steps) == "stop")
        due = self.checkpoint and (done % self.checkpoint.every == 0 or done == self.steps)
        if self.checkpoint is not None and (due or stop):
            self.checkpoint.save(done, x, self.features.took)
        return stop


def schedules(
    model: Backbone, settings: Settings, editor: Editor, size: tuple[int, int]
) -> tuple[Schedule, Schedule | None]:
    """Of sampling and of inversion, which an editor may do without, for latents of a size."""
    schedule = model.schedule(settings.steps, size)
    if not editor.inverts:
        return schedule, None
    try:
        grid = model.schedule(settings.inversion_steps or settings.steps, size)
    except InputError as error:
        raise InputError(f"inversion_steps: {error}") from error
    return schedule, schedule.refined(grid)


def frames_needed(
    shard: WindowShard, settings: Settings, editor: Editor, way: type[Consistency] | None = None
) -> range:
    """The frames of the source that a rank reads: of its windows and of one more at each side.

    All frames where the editor conditions other ranks' keyframes.
    """
    if sees_all(settings, editor, way):
        return range(shard.windows[-1].stop)
    return shard.positions(shard.halo)


def sees_all(settings: Settings, editor: Editor, way: type[Consistency] | None = None) -> bool:
    """Whether an editor may condition any of the clip's frames on each rank."""
    bounded = settings.keyframe_attention == "windowed"
    return bounded and propagates(way or WAYS[settings.consistency]) and editor.sees_other_frames


def flow_of(
    clip: Clip, model: Backbone, kernel: Propagation, asked: bool, wanted: bool, required: bool
) -> ClipFlow | None:
    """A clip's optical flow, by the kernel's provider where it has one.

    Args:
        clip: The frames of the source that a rank needs.
        model: The frozen model.
        kernel: What finds correspondences.
        asked: Whether it is asked for any.
        wanted: Whether the edit has another use for flow.
        required: Whether it cannot do without, then.
    """
    if kernel.flow is not None and (asked or wanted):
        return ClipFlow(clip, kernel.flow, model.latent_scale)
    if not wanted:
        return None
    try:
        return LatentFlow(clip, model.latent_scale)
    except InputError:  # the frames are too small for it
        if required:
            raise
        return None


def propagates(way: type[Consistency]) -> bool:
    """Whether a way of consistency may denoise keyframes jointly and propagate from them."""
    return not issubclass(way, PerFrame | Joint)


def fuses(way: type[Consistency]) -> bool:
    """Whether a way of consistency fuses what keyframes predict."""
    return way.fused is not Consistency.fused


def region_of(
    mask: Clip, clip: Clip, model: Backbone, settings: Settings, ranks: FrameGroup
) -> Region:
    """Where a rank's frames may be changed.

    Raises:
        InputError: The mask does not fit the clip, or is black in all of its frames.
    """
    with ranks.together(), ranks.preemption.interruptible():
        region = Region(mask, clip, model.latent_scale, settings.mask_edge)
    (some,) = ranks.any(bool(region.latents.any()))
    if not some:
        raise InputError(
            "the mask is black in every frame, so that nothing would be edited: expected white "
            "where the edit may be; invert the mask, or leave it out"
        )
    return region


def check(model: Backbone, clip: Clip, prompts: Prompts) -> None:
    """Raises `InputError` for what would fail later, before any work is done."""
    check_prompt(prompts.prompt)
    if not prompts.inversion_prompt.strip():
        warnings.warn(
            "the inversion prompt is empty: the source is inverted without a description; say what "
            "it shows (inversion_prompt), and the edit keeps more of it",
            stacklevel=2,
        )
    check_size(model, clip)


def check_prompt(prompt: str) -> None:
    """Raises `InputError` for an empty prompt."""
    if not prompt.strip():
        raise InputError("the prompt is empty; say what the edited video shows")


def decoded(
    model: Backbone,
    latents: Float[Tensor, "frames c h w"],
    source: Clip,
    batch: int,
    on_step: OnStep,
    region: Region | None = None,
) -> Clip:
    """The edited clip, over the source outside of a region; its frames are where the source's are,
    in memory or not.
    """
    lazy = isinstance(source.frames, Frames)
    height, width = source.frames.shape[-2:]
    buffer, parts = FrameBuffer((height, width)), []
    codes = latents.split(batch)
    for number, part in enumerate(codes, start=1):
        frames = model.decode(part).cpu()
        require_finite(frames, "the decoded frames")
        if region is not None:
            here = slice((number - 1) * batch, (number - 1) * batch + len(part))
            frames = region.composite(frames, source.frames[here], source.positions[here])
        if lazy:
            buffer.extend(frames)
        else:
            parts.append(frames)
        reported(on_step, "decode", number, len(codes))
    return dataclasses.replace(source, frames=buffer.frames if lazy else torch.cat(parts))


def inversion_quality(sampling: Sampling, clip: Clip, on_step: OnStep) -> dict[str, float]:
    """PSNR in dB of the clip, inverted and sampled back, and of the VAE alone."""
    ranks, trajectory, schedule = sampling.ranks, sampling.trajectory, sampling.schedule
    model, batch = sampling.network.model, sampling.settings.batch
    predict = partial(source_output, sampling.network, schedule)
    with ranks.together(), ranks.preemption.interruptible():
        back = reconstruct(
            model, predict, trajectory, schedule, batch,
            lambda done: reported(on_step, "reconstruct", done, len(schedule)),
        )  # fmt: skip
        errors = [decoding_error(model, x, clip, batch) for x in (back, trajectory.clean)]
    weight = 0 if sampling.shard.idle else len(clip)
    psnr = [decibels(ranks.mean(error, weight)) for error in errors]
    return dict(zip(("reconstruction_psnr", "round_trip_psnr"), psnr, strict=True))


def decoding_error(
    model: Backbone, codes: Float[Tensor, "frames c h w"], clip: Clip, batch: int
) -> float:
    """The mean squared difference of decoded latents to a clip's."""
    error = 0.0
    for some in torch.arange(len(codes)).split(batch):
        error += float((model.decode(codes[some]).cpu() - clip.frames[some]).square().sum())
    return error / prod(clip.frames.shape)
