"""The conformance kit: good plugins pass it, and for every check a wrong one fails."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor

from tokenflow.diffusion import Backbone, Schedule, Trajectory
from tokenflow.editors import Edit, Editor, Pass, PnP, SDEdit, Start
from tokenflow.errors import InputError
from tokenflow.propagation import Correspondence, FlowWeighted, NNField, Propagation, Window
from tokenflow.testing import (
    Check,
    ConformanceError,
    check_editor,
    check_kernel,
    editor_checks,
    kernel_checks,
)
from tokenflow.video import Clip


def residual(forward: Pass, value: Tensor) -> dict[str, Any]:
    """A mid-block residual of one value per frame, in every branch."""
    size = [side // 8 for side in forward.latents.shape[-2:]]
    value = value.repeat(len(forward.branches)).view(-1, 1, 1, 1).expand(-1, 16, *size)
    none = [value.new_zeros(1)] * 12
    return {"mid_block_additional_residual": value, "down_block_additional_residuals": none}


class ByFrame(PnP):
    """Conditions every pass by what it was shown of its frames, as a ControlNet does."""

    interface = 1
    conditions_source = True

    def prepare(self, backbone: Backbone, clip: Clip) -> None:
        means = clip.frames[:].mean((1, 2, 3)).to(backbone.unet.dtype)
        self.means = dict(zip(clip.positions, means, strict=True))

    def conditioning(self, forward: Pass) -> dict[str, Any]:
        return residual(forward, torch.stack([self.means[frame] for frame in forward.frames]))


GOOD: list[Check] = [
    *kernel_checks(NNField()),
    *kernel_checks(NNField(block=3)),
    *kernel_checks(FlowWeighted()),
    *editor_checks(PnP()),
    *editor_checks(SDEdit(strength=0.5, noise="independent")),
    *editor_checks(ByFrame()),
]


@pytest.mark.parametrize("check", GOOD)
def test_the_built_in_plugins_pass(check: Check) -> None:
    check()


class Kernel(NNField):
    """The paper's kernel; the wrong ones below spoil its answer."""

    interface = 1

    def correspond(self, source: Tensor, keys: Tensor, window: Window) -> Correspondence:
        found = super().correspond(source, keys, window)
        indices, weights = self.spoiled(found.indices, found.weights, window)
        return Correspondence(indices, weights)

    def spoiled(self, indices: Tensor, weights: Tensor, window: Window) -> tuple[Tensor, Tensor]:
        return indices, weights


class Beyond(Kernel):
    def spoiled(self, indices: Tensor, weights: Tensor, window: Window) -> tuple[Tensor, Tensor]:
        return indices + 1000, weights


class Negative(Kernel):
    def spoiled(self, indices: Tensor, weights: Tensor, window: Window) -> tuple[Tensor, Tensor]:
        return indices, torch.stack([1 - 2 * weights[..., 1], 2 * weights[..., 1]], -1) - 0.5


class Unnormalised(Kernel):
    def spoiled(self, indices: Tensor, weights: Tensor, window: Window) -> tuple[Tensor, Tensor]:
        return indices, weights * 0.9


class OneTap(Kernel):
    def spoiled(self, indices: Tensor, weights: Tensor, window: Window) -> tuple[Tensor, Tensor]:
        return indices[:, :1], weights[:, :1]


class Float32Only(Kernel):
    def correspond(self, source: Tensor, keys: Tensor, window: Window) -> Correspondence:
        found = super().correspond(source, keys, window)
        here = (source @ keys[0].T.float()).softmax(-1)  # fails for a lower precision
        assert here.isfinite().all()
        return found


class Widening(Correspondence):
    def gather(self, values: Tensor) -> Tensor:
        return super().gather(values).float()


class Widens(NNField):
    def correspond(self, source: Tensor, keys: Tensor, window: Window) -> Correspondence:
        found = super().correspond(source, keys, window)
        return Widening(found.indices, found.weights)


class Random(Kernel):
    def spoiled(self, indices: Tensor, weights: Tensor, window: Window) -> tuple[Tensor, Tensor]:
        return indices[:, torch.randperm(indices.shape[1])], weights


class Remembers(Kernel):
    calls = 0

    def spoiled(self, indices: Tensor, weights: Tensor, window: Window) -> tuple[Tensor, Tensor]:
        self.calls += 1
        return indices.roll(self.calls, dims=1), weights


class Caching(NNField):
    """Keeps its answer to a window, for all steps."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[Any, Correspondence] = {}

    def correspond(self, source: Tensor, keys: Tensor, window: Window) -> Correspondence:
        here = window.frames, window.keyframes, window.height, window.width
        if here not in self.seen:
            self.seen[here] = super().correspond(source, keys, window)
        return self.seen[here]


class CachingForAll(Caching):
    """Keeps it for all others of its kind, too."""

    everyones: ClassVar[dict[Any, Correspondence]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.seen = {}

    def correspond(self, source: Tensor, keys: Tensor, window: Window) -> Correspondence:
        self.seen = self.everyones
        return super().correspond(source, keys, window)


class HalfPrecision(NNField):
    """Answers in the tokens' dtype, in which sums are rounded."""

    def correspond(self, source: Tensor, keys: Tensor, window: Window) -> Correspondence:
        found = super().correspond(source, keys, window)
        return Correspondence(found.indices, found.weights.to(source.dtype))


class SeedsNumPy(Kernel):
    def spoiled(self, indices: Tensor, weights: Tensor, window: Window) -> tuple[Tensor, Tensor]:
        np.random.seed(window.frames[0])
        return indices, weights


class SeedsTorch(Kernel):
    def spoiled(self, indices: Tensor, weights: Tensor, window: Window) -> tuple[Tensor, Tensor]:
        torch.manual_seed(3)
        return indices, weights


class WantsGradients(Kernel):
    def spoiled(self, indices: Tensor, weights: Tensor, window: Window) -> tuple[Tensor, Tensor]:
        torch.set_grad_enabled(True)
        torch.use_deterministic_algorithms(True)
        return indices, weights


class InPlace(NNField):
    def correspond(self, source: Tensor, keys: Tensor, window: Window) -> Correspondence:
        return super().correspond(source, keys.sub_(keys.mean()), window)


class FirstBranch(Correspondence):
    def gather(self, values: Tensor) -> Tensor:
        return super().gather(values[:1].expand_as(values))


class Branching(NNField):
    def correspond(self, source: Tensor, keys: Tensor, window: Window) -> Correspondence:
        found = super().correspond(source, keys, window)
        return FirstBranch(found.indices, found.weights)


class Square(Kernel):
    def spoiled(self, indices: Tensor, weights: Tensor, window: Window) -> tuple[Tensor, Tensor]:
        side = int(indices.shape[1] ** 0.5)
        return indices.unflatten(1, (side, side)).flatten(1, 2), weights


class TwoKeyframes(Kernel):
    def spoiled(self, indices: Tensor, weights: Tensor, window: Window) -> tuple[Tensor, Tensor]:
        assert len(window.keyframes) > 1
        return indices, weights


class MeanOfFrames(Kernel):
    def spoiled(self, indices: Tensor, weights: Tensor, window: Window) -> tuple[Tensor, Tensor]:
        return indices, weights.mean(0, keepdim=True).expand_as(weights)


class Shifted(Kernel):
    def spoiled(self, indices: Tensor, weights: Tensor, window: Window) -> tuple[Tensor, Tensor]:
        tokens = window.height * window.width
        return indices // tokens * tokens + (indices + 1) % tokens, weights


class UntypedKernel(NNField):
    def __init__(self, block=7) -> None:  # type: ignore[no-untyped-def]
        super().__init__(block)


class ByFunction(NNField):
    def __init__(self, similarity: Callable[..., Any] | None = None) -> None:
        super().__init__()


class ByAnything(NNField):
    def __init__(self, similarities: Sequence[Any] = ()) -> None:
        super().__init__()


class Dense(NNField):
    def correspond(self, source: Tensor, keys: Tensor, window: Window) -> Any:
        return source @ keys.flatten(0, 1).T


class Counted(NNField):
    """What it says of itself changes from time to time."""

    said = 0

    def content(self) -> str:
        self.said += 1
        return str(self.said)


class NoText(NNField):
    def content(self) -> str:
        return 5  # type: ignore[return-value]


class Leaves(NNField):
    def correspond(self, source: Tensor, keys: Tensor, window: Window) -> Correspondence:
        raise SystemExit(0)


WRONG_KERNELS: list[tuple[Propagation, str, str]] = [
    (Beyond(), "index_range", "indices from 0 to 31"),
    (Dense(), "index_range", "expected a Correspondence, got Tensor"),
    (OneTap(), "index_range", r"indices of shape \(6, 16, taps\), got \(6, 1, 2\)"),
    (Negative(), "non_negative", "weights of 0 or more"),
    (Unnormalised(), "rows_sum_to_one", r"got sums from 0\.9 to 0\.9; divide"),
    (Float32Only(), "device_and_dtype", "expected no exception, got RuntimeError"),
    (Widens(), "device_and_dtype", "bfloat16, got torch.float32; do not override"),
    (Random(), "determinism", "draw nothing at random"),
    (Remembers(), "determinism", "keep nothing between calls"),
    (Caching(), "calls_independent", "keep nothing between calls"),
    (CachingForAll(), "calls_independent", "keep nothing between calls"),
    (HalfPrecision(), "device_and_dtype", "rows of weights that sum to 1"),
    (InPlace(), "inputs_unchanged", "work on a copy"),
    (SeedsNumPy(), "global_state_unchanged", "another NumPy's random state"),
    (SeedsTorch(), "global_state_unchanged", "another torch's random state"),
    (WantsGradients(), "global_state_unchanged", "gradient mode and torch's deterministic mode"),
    (Branching(), "branch_order", "in any order"),
    (Square(), "non_square_sites", "expected no exception"),
    (TwoKeyframes(), "one_frame_windows", "expected no exception, got AssertionError"),
    (MeanOfFrames(), "frames_independent", "treat every frame on its own"),
    (Counted(), "content_as_text", r"the same text at every time, got \['1', '2', '3'\]"),
    (NoText(), "content_as_text", r"the same text at every time, got \[5, 5, 5\]; make it a"),
    (Leaves(), "index_range", "expected no exception, got SystemExit: 0"),
    (Shifted(), "identity_at_keyframes", "or set identity_at_keyframes = False"),
    (UntypedKernel(), "configuration_round_trip", "named and typed, got block=7"),
    (UntypedKernel(), "interface_stated", "a class that states interface = 1, got None; write"),
    (ByFunction(), "configuration_round_trip", "got similarity: .*Callable.* could call functions"),
    (ByAnything(), "configuration_round_trip", "got similarities: .*Any"),
]


def assert_fails(checks: list[Check], name: str, message: str) -> None:
    (check,) = [check for check in checks if check.__name__ == name]
    with pytest.raises(ConformanceError, match=message) as raised:
        check()
    error = raised.value
    assert error.check == name
    assert str(error) == f"{name}: expected {error.expected}, got {error.got}; {error.advice}"


def name_of(value: object) -> str | None:
    return type(value).__name__ if isinstance(value, (Editor, Propagation)) else None


@pytest.mark.parametrize(("kernel", "check", "message"), WRONG_KERNELS, ids=name_of)
def test_a_wrong_kernel_fails_its_check(kernel: Propagation, check: str, message: str) -> None:
    assert_fails(kernel_checks(kernel), check, message)


@pytest.mark.parametrize("seed", range(4))
def test_a_seed_is_noticed_whatever_was_seeded_before(seed: int) -> None:
    np.random.seed(seed)
    torch.manual_seed(seed)
    for kernel, message in ((SeedsNumPy(), "NumPy's"), (SeedsTorch(), "torch's")):
        assert_fails(kernel_checks(kernel), "global_state_unchanged", f"another {message} random")


def test_every_kernel_check_can_fail() -> None:
    names = {check.__name__ for check in kernel_checks(NNField())}
    assert names == {check for _, check, _ in WRONG_KERNELS}


def test_identity_is_checked_only_where_it_is_claimed() -> None:
    kernel = Shifted()
    kernel.identity_at_keyframes = False  # type: ignore[misc]
    check_kernel(kernel)


class FewFrames(PnP):
    def start(self, trajectory: Trajectory, schedule: Schedule, seed: int) -> Start:
        return Start(trajectory.at(schedule.timesteps[0])[1:], schedule.timesteps)


class Backwards(PnP):
    def start(self, trajectory: Trajectory, schedule: Schedule, seed: int) -> Start:
        return Start(trajectory.at(schedule.timesteps[0]), schedule.timesteps[::-1])


class ForeignTimestep(PnP):
    def start(self, trajectory: Trajectory, schedule: Schedule, seed: int) -> Start:
        return Start(trajectory.at(schedule.timesteps[0]), (schedule.timesteps[0] + 1,))


def edit_of(unet: UNet2DConditionModel, function: Any, until: float = 1.0) -> list[Edit]:
    return [Edit(unet.up_blocks[1].resnets[1].conv2, function, until)]


class OneBranch(PnP):
    def edits(self, unet: UNet2DConditionModel) -> Sequence[Edit]:
        return edit_of(unet, lambda edited, source: source[None])


class Always(PnP):
    def edits(self, unet: UNet2DConditionModel) -> Sequence[Edit]:
        return edit_of(unet, lambda edited, source: edited, until=50.0)


class Float32(PnP):
    def edits(self, unet: UNet2DConditionModel) -> Sequence[Edit]:
        return edit_of(unet, lambda edited, source: edited.float())


class NotTensor(PnP):
    def edits(self, unet: UNet2DConditionModel) -> Sequence[Edit]:
        return edit_of(unet, lambda edited, source: None)


class Gap(PnP):
    def start(self, trajectory: Trajectory, schedule: Schedule, seed: int) -> Start:
        return Start(trajectory.at(schedule.timesteps[0]), schedule.timesteps[:1])


class Halving(PnP):
    def constrain(
        self, latents: Tensor, frames: tuple[int, ...], t: int | None, trajectory: Trajectory
    ) -> Tensor:
        return latents[: len(latents) // 2]


class OnlySampling(PnP):
    def conditioning(self, forward: Pass) -> dict[str, Any]:
        _, negative, _ = forward.embeddings  # there is one alone in inversion
        assert negative.isfinite().all()
        return {}


class LeavesHook(PnP):
    def prepare(self, backbone: Backbone, clip: Clip) -> None:
        backbone.unet.conv_in.register_forward_hook(lambda module, inputs, output: None)


class ChangesWeights(PnP):
    def prepare(self, backbone: Backbone, clip: Clip) -> None:
        backbone.unet.conv_in.bias.data.add_(1e-3)


class LeavesBackwardHook(PnP):
    def edits(self, unet: UNet2DConditionModel) -> Sequence[Edit]:
        unet.conv_out.register_full_backward_hook(lambda *_: None)
        return super().edits(unet)


class ReplacesForward(PnP):
    def prepare(self, backbone: Backbone, clip: Clip) -> None:
        vae: Any = backbone.vae
        vae.forward = vae.decode


class ChangesVAE(PnP):
    def prepare(self, backbone: Backbone, clip: Clip) -> None:
        backbone.vae.decoder.conv_out.weight.data.mul_(0.5)


class Trains(PnP):
    def prepare(self, backbone: Backbone, clip: Clip) -> None:
        backbone.text_encoder.train()


class ChangesScheduler(PnP):
    def prepare(self, backbone: Backbone, clip: Clip) -> None:
        backbone.scheduler.alphas_cumprod.mul_(0.9)


class ReplacesProcessors(PnP):
    def prepare(self, backbone: Backbone, clip: Clip) -> None:
        backbone.unet.set_attn_processor(AttnProcessor())


class WritesSource(PnP):
    def edits(self, unet: UNet2DConditionModel) -> Sequence[Edit]:
        return edit_of(unet, lambda edited, source: source.mul_(1.1).expand_as(edited))


class ConditionsSource(PnP):
    def conditioning(self, forward: Pass) -> dict[str, Any]:
        on = float(len(forward.branches) > 1)  # but not in inversion
        return residual(forward, on * torch.ones(len(forward.frames)))


class SecretlyConditions(PnP):
    conditions_source = False

    def conditioning(self, forward: Pass) -> dict[str, Any]:
        return residual(forward, torch.ones(len(forward.frames)))


class Numbers(PnP):
    def content(self, frame: int) -> Any:
        return frame


class CountsContent(PnP):
    """Says of what file it was made, by when it was asked."""

    calls = 0

    def content(self, frame: int) -> str:
        self.calls += 1
        return f"{self.calls}"


class NumbersOwn(PnP):
    """Takes the first frame that a rank has for the clip's first."""

    def start(self, trajectory: Trajectory, schedule: Schedule, seed: int) -> Start:
        own = [torch.Generator().manual_seed(seed + i) for i in range(len(trajectory.clean))]
        noise = [torch.randn(trajectory.clean.shape[1:], generator=one) for one in own]
        return Start(torch.stack(noise), schedule.timesteps)


class Uneven(PnP):
    """Skips a step of frames that are not the clip's first."""

    def start(self, trajectory: Trajectory, schedule: Schedule, seed: int) -> Start:
        begin = super().start(trajectory, schedule, seed)
        first = trajectory.positions.start
        return dataclasses.replace(begin, timesteps=begin.timesteps[min(first, 1) :])


class ByPlaceInPass(PnP):
    """Takes a frame's place in the pass for its place in the clip."""

    def conditioning(self, forward: Pass) -> dict[str, Any]:
        return residual(forward, torch.arange(len(forward.frames)).float())


class UnknownArgument(PnP):
    def conditioning(self, forward: Pass) -> dict[str, Any]:
        return {"encoder_hidden_states": forward.embeddings}


class WritesPass(PnP):
    def conditioning(self, forward: Pass) -> dict[str, Any]:
        forward.latents[1:].mul_(1.5)
        return {}


class CountsCalls(PnP):
    """Spoils what comes after the third call of a clip's edit."""

    def start(self, trajectory: Trajectory, schedule: Schedule, seed: int) -> Start:
        self.calls = 0
        return super().start(trajectory, schedule, seed)

    def edits(self, unet: UNet2DConditionModel) -> Sequence[Edit]:
        return edit_of(unet, self.spoil)

    def spoil(self, edited: Tensor, source: Tensor) -> Tensor:
        self.calls += 1
        return edited if self.calls < 4 else edited * 0.5


class FirstClip(PnP):
    """Mixes in the first clip that it ever saw."""

    seen: Tensor | None = None

    def prepare(self, backbone: Backbone, clip: Clip) -> None:
        if self.seen is None:
            self.seen = backbone.encode(clip.frames)

    def constrain(
        self, latents: Tensor, frames: tuple[int, ...], t: int | None, trajectory: Trajectory
    ) -> Tensor:
        assert self.seen is not None
        return (latents + self.seen[list(frames)]) / 2


EARLIER: dict[int, Tensor] = {}


class Mode(Enum):
    """An option's type of a plugin's own module."""

    PLAIN = "plain"
    TWICE = "twice"


class ByMode(NNField):
    """The paper's kernel, if it knows its own option again."""

    interface = 1

    def __init__(self, mode: Mode = Mode.PLAIN) -> None:
        super().__init__()
        self.mode = mode

    def correspond(self, source: Tensor, keys: Tensor, window: Window) -> Correspondence:
        found = super().correspond(source, keys, window)
        return found if self.mode is Mode.PLAIN else Correspondence(found.indices, -found.weights)


def test_a_plugin_is_made_anew_with_the_classes_of_its_module() -> None:
    check_kernel(ByMode())


class FirstLatents(SDEdit):
    """Starts every clip from the latents of the first one that any editor has seen."""

    def start(self, trajectory: Trajectory, schedule: Schedule, seed: int) -> Start:
        begin = super().start(trajectory, schedule, seed)
        kept = [
            EARLIER.setdefault(position, latents)
            for position, latents in zip(trajectory.positions, begin.latents, strict=True)
        ]
        return dataclasses.replace(begin, latents=torch.stack(kept))


class NumbersFrames(PnP):
    """Takes positions in the clip for numbers of the frames that it was shown."""

    def prepare(self, backbone: Backbone, clip: Clip) -> None:
        self.seen = backbone.encode(clip.frames[:])

    def conditioning(self, forward: Pass) -> dict[str, Any]:
        assert self.seen[list(forward.frames)].isfinite().all()
        return {}

    def constrain(
        self, latents: Tensor, frames: tuple[int, ...], t: int | None, trajectory: Trajectory
    ) -> Tensor:
        return (latents + self.seen[list(frames)]) / 2


class ShowsFirst(PnP):
    """Takes the first frame that it was shown for the clip's."""

    def prepare(self, backbone: Backbone, clip: Clip) -> None:
        self.first = backbone.encode(clip.frames[:1])

    def edits(self, unet: UNet2DConditionModel) -> Sequence[Edit]:
        return edit_of(unet, lambda edited, source: edited + self.first.mean())

    def constrain(
        self, latents: Tensor, frames: tuple[int, ...], t: int | None, trajectory: Trajectory
    ) -> Tensor:
        return (latents + self.first) / 2


class SeedsEverything(PnP):
    def start(self, trajectory: Trajectory, schedule: Schedule, seed: int) -> Start:
        torch.manual_seed(seed)
        return Start(torch.randn_like(trajectory.clean), schedule.timesteps)


class NoiseOfAllFrames(PnP):
    def start(self, trajectory: Trajectory, schedule: Schedule, seed: int) -> Start:
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(trajectory.clean.shape, generator=generator)
        return Start(noise, schedule.timesteps)


class MeanFeatures(PnP):
    def edits(self, unet: UNet2DConditionModel) -> Sequence[Edit]:
        return edit_of(unet, lambda edited, source: edited.mean(1, keepdim=True).expand_as(edited))


class MeanLatents(PnP):
    def constrain(
        self, latents: Tensor, frames: tuple[int, ...], t: int | None, trajectory: Trajectory
    ) -> Tensor:
        return latents - latents.mean(0)


class ConstrainsInPlace(PnP):
    def constrain(
        self, latents: Tensor, frames: tuple[int, ...], t: int | None, trajectory: Trajectory
    ) -> Tensor:
        return latents.mul_(0.9)


class GlobalNoise(PnP):
    def start(self, trajectory: Trajectory, schedule: Schedule, seed: int) -> Start:
        return Start(torch.randn_like(trajectory.clean), schedule.timesteps)


class Counting(PnP):
    clips = 0

    def prepare(self, backbone: Backbone, clip: Clip) -> None:
        self.clips += 1

    def start(self, trajectory: Trajectory, schedule: Schedule, seed: int) -> Start:
        begin = super().start(trajectory, schedule, seed)
        return dataclasses.replace(begin, latents=begin.latents * (1 + 0.01 * self.clips))


class ScalesTrajectory(PnP):
    def start(self, trajectory: Trajectory, schedule: Schedule, seed: int) -> Start:
        return Start(trajectory.at(schedule.timesteps[0]).mul_(1.01), schedule.timesteps)


class AnyOptions(PnP):
    def __init__(self, **options: float) -> None:
        super().__init__(**options)  # type: ignore[arg-type]


ONES = torch.ones(2)


class TensorOption(PnP):
    def __init__(self, weights: Tensor = ONES) -> None:
        super().__init__()


WRONG_EDITORS: list[tuple[Editor, str, str]] = [
    (FewFrames(), "start_shape", r"shape \(4, 4, 8, 16\), got \(3, 4, 8, 16\); start from"),
    (Backwards(), "timesteps_of_the_schedule", "or a tail of them, got"),
    (ForeignTimestep(), "timesteps_of_the_schedule", r"got \(502,\); choose from"),
    (NoiseOfAllFrames(), "start_per_frame", "draw noise by trajectory.positions"),
    (Gap(), "timesteps_of_the_schedule", "or a tail of them, got"),
    (OneBranch(), "edits_keep_shape_and_dtype", "the function must return all edited"),
    (Always(), "edits_keep_shape_and_dtype", "modules, until from 0 to 1"),
    (Float32(), "edits_keep_shape_and_dtype", "of dtype torch.bfloat16, got torch.float32"),
    (NotTensor(), "edits_keep_shape_and_dtype", "the edited output in a tensor, got NoneType"),
    (Halving(), "result_shape", "expected"),
    (OnlySampling(), "result_shape", "expected no exception, got ValueError"),
    (LeavesHook(), "backbone_restored", "to be what it was, got 1 hooks on the unet; return"),
    (ChangesWeights(), "backbone_restored", r"got [0-9a-f]{8} as the unet's weights"),
    (LeavesBackwardHook(), "backbone_restored", r"got \d hooks on the unet"),
    (ReplacesForward(), "backbone_restored", "1 as the vae's replaced methods"),
    (ChangesVAE(), "backbone_restored", "as the vae's weights"),
    (Trains(), "backbone_restored", "as the text_encoder's training flags"),
    (ChangesScheduler(), "backbone_restored", "as the scheduler's alphas"),
    (ReplacesProcessors(), "backbone_restored", "do not change the UNet's processors"),
    (WritesSource(), "source_branch_unchanged", "do not write into the source"),
    (ConditionsSource(), "source_branch_unchanged", "condition its branch as in inversion"),
    (
        SecretlyConditions(),
        "source_condition_stated",
        r"a difference of \d.* at timestep 501",
    ),
    (Numbers(), "content_of_frames", r"to return text, got \[0, 1, 2, 3, 0, 1, 2, 3\]; return a"),
    (CountsContent(), "content_of_frames", "the same content of a frame at every time"),
    (NumbersOwn(), "two_ranks_agree", r"as on one, got a difference of \d.*; go by positions"),
    (ShowsFirst(), "two_ranks_agree", "the same edit on two ranks as on one"),
    (OnlySampling(), "two_ranks_agree", "got ValueError"),
    (Uneven(), "two_ranks_agree", "as many steps, got one that ends before another; choose"),
    (Uneven(), "start_per_frame", r"others where it has frames \[1, 2, 3\] alone; choose them"),
    (ByPlaceInPass(), "frames_independent_of_the_pass", "go by the pass's `frames`"),
    (MeanFeatures(), "frames_independent_of_the_pass", "depends on the batch"),
    (UnknownArgument(), "frames_independent_of_the_pass", r"got \['encoder_hidden_states'\]"),
    (CountsCalls(), "batch_independent", "keep nothing from one call to the next"),
    (NumbersFrames(), "frames_independent_of_the_pass", "no exception, got IndexError"),
    (NumbersFrames(), "constrain_per_frame", "no exception, got IndexError"),
    (ShowsFirst(), "frames_independent_of_the_pass", r"frames \[1, 2, 3\] alone on a rank"),
    (ShowsFirst(), "constrain_per_frame", r"frames \[1, 2, 3\] alone on a rank; go by `frames`"),
    (MeanLatents(), "constrain_per_frame", "treat every frame on its own"),
    (ConstrainsInPlace(), "constrain_per_frame", "changed in place"),
    (GlobalNoise(), "determinism_from_the_seed", "draw with a torch.Generator"),
    (Counting(), "determinism_from_the_seed", "from one clip to the next"),
    (FirstClip(), "clips_independent", "whatever is kept of a clip"),
    (FirstLatents(), "clips_independent", "whatever is kept of a clip"),
    (SeedsEverything(), "global_state_unchanged", "another torch's random state"),
    (WritesPass(), "inputs_unchanged", "every pass left as they were"),
    (ScalesTrajectory(), "inputs_unchanged", "work on a copy"),
    (AnyOptions(), "configuration_round_trip", r"got \*\*options: "),
    (TensorOption(), "configuration_round_trip", "expected"),
    (Backwards(), "interface_stated", "a class that states interface = 1, got None; write"),
]


@pytest.mark.parametrize(("editor", "check", "message"), WRONG_EDITORS, ids=name_of)
def test_a_wrong_editor_fails_its_check(editor: Editor, check: str, message: str) -> None:
    assert_fails(editor_checks(editor), check, message)


def test_every_editor_check_can_fail() -> None:
    names = {check.__name__ for check in editor_checks(PnP())}
    assert names == {check for _, check, _ in WRONG_EDITORS}


class Forked(PnP):
    """Draws by torch's own random state, and puts that back."""

    interface = 1

    def start(self, trajectory: Trajectory, schedule: Schedule, seed: int) -> Start:
        noise = []
        for position in trajectory.positions:
            with torch.random.fork_rng():
                torch.manual_seed(seed + position)
                noise.append(torch.randn(trajectory.clean.shape[1:]))
        return Start(torch.stack(noise), schedule.timesteps)


def test_ranks_do_not_see_each_others_random_state() -> None:
    (check,) = [one for one in editor_checks(Forked()) if one.__name__ == "two_ranks_agree"]
    for _ in range(5):
        check()


def test_a_refusal_of_the_plugin_is_a_failure_that_quotes_it() -> None:
    class Picky(PnP):
        def prepare(self, backbone: Backbone, clip: Clip) -> None:
            raise InputError("needs 8 frames")

    with pytest.raises(ConformanceError, match="no exception, got InputError: needs 8 frames"):
        check_editor(Picky())


class Plain(NNField):
    """Has no options at all."""

    interface = 1

    def __init__(self) -> None:
        super().__init__()


def test_a_plugin_without_options_passes() -> None:
    check_kernel(Plain())


def test_one_call_stops_at_the_first_failure() -> None:
    with pytest.raises(AssertionError, match=r"^rows_sum_to_one: "):
        check_kernel(Unnormalised())
