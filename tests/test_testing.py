"""The conformance kit: our plugins pass it, and for every rule a broken one fails its check."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from enum import Enum
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor

from tests.diffusion.making import make_controlnet
from tokenflow.diffusion import Backbone, Schedule, Source
from tokenflow.editors import Batch, ControlNet, Editor, Injection, PnP, SDEdit, Start, Step
from tokenflow.errors import InputError
from tokenflow.propagation import Correspondence, FlowWeighted, NNField, Propagation, Window
from tokenflow.testing import (
    Check,
    ConformanceError,
    check_editor,
    check_kernel,
    editor_checks,
    kernel_checks,
    tiny_backbone,
)
from tokenflow.video import Clip

KERNELS = (NNField(), NNField(block=3), FlowWeighted())
EDITORS = (PnP(), SDEdit(strength=0.5, noise="independent"))
EDITOR_CHECKS = [check.__name__ for check in editor_checks(PnP())]


def name_of(check: Check) -> str:
    return f"{type(check.plugin).__name__}-{check.__name__}"


@pytest.mark.parametrize("check", [c for k in KERNELS for c in kernel_checks(k)], ids=name_of)
def test_a_kernel_of_ours_passes(check: Check) -> None:
    check()


@pytest.mark.parametrize("check", [c for e in EDITORS for c in editor_checks(e)], ids=name_of)
def test_an_editor_of_ours_passes(check: Check) -> None:
    check()


@pytest.fixture(scope="module")
def controlnet(tmp_path_factory: pytest.TempPathFactory) -> list[Check]:
    """The checks of a ControlNet that fits the tiny model, and controls the source as well."""
    model: Any = tiny_backbone()
    folder = make_controlnet(tmp_path_factory.mktemp("control"), model.unet)
    return editor_checks(ControlNet(str(folder), control_source=True))


@pytest.mark.parametrize("name", EDITOR_CHECKS)
def test_a_controlnet_passes(name: str, controlnet: list[Check]) -> None:
    (check,) = [check for check in controlnet if check.__name__ == name]
    check()


def assert_fails(checks: list[Check], name: str, message: str) -> None:
    (check,) = [check for check in checks if check.__name__ == name]
    with pytest.raises(ConformanceError, match=message) as raised:
        check()
    error = raised.value
    assert error.check == name
    assert str(error) == f"{name}: expected {error.expected}, got {error.got}; {error.advice}"


Spoil = Callable[[Correspondence, Tensor, Tensor, Window], Any]


def kernel(spoil: Spoil) -> Propagation:
    """The paper's kernel, whose answer becomes another, of it, the tokens and the window."""

    def correspond(self: NNField, source: Tensor, keys: Tensor, window: Window) -> Any:
        return spoil(NNField.correspond(self, source, keys, window), source, keys, window)

    return type("Broken", (NNField,), {"correspond": correspond})()


def spoilt(
    indices: Callable[[Tensor], Tensor] = lambda indices: indices,
    weights: Callable[[Tensor], Tensor] = lambda weights: weights,
) -> Propagation:
    """The paper's kernel with other indices or weights."""
    return kernel(lambda found, *_: Correspondence(indices(found.indices), weights(found.weights)))


def acting(act: Callable[[Tensor, Tensor, Window], Any]) -> Propagation:
    """The paper's kernel, which does something else as well."""

    def spoil(found: Correspondence, *given: Any) -> Correspondence:
        act(*given)
        return found

    return kernel(spoil)


class Widening(Correspondence):
    def gather(self, values: Tensor) -> Tensor:
        return super().gather(values).float()


class FirstBranch(Correspondence):
    def gather(self, values: Tensor) -> Tensor:
        return super().gather(values[:1].expand_as(values))


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

    def correspond(self, source: Tensor, keys: Tensor, window: Window) -> Correspondence:
        self.seen = self.everyones
        return super().correspond(source, keys, window)


class UntypedKernel(NNField):
    def __init__(self, block=7) -> None:  # type: ignore[no-untyped-def]
        super().__init__(block)


class ByFunction(NNField):
    def __init__(self, similarity: Callable[..., Any] | None = None) -> None:
        super().__init__()


class ByAnything(NNField):
    def __init__(self, similarities: Sequence[Any] = ()) -> None:
        super().__init__()


def next_tokens(found: Correspondence, source: Tensor, *_: Any) -> Correspondence:
    tokens = source.shape[1]
    places = found.indices // tokens * tokens + (found.indices + 1) % tokens
    return Correspondence(places, found.weights)


def at_random(indices: Tensor) -> Tensor:
    return indices[:, torch.randperm(indices.shape[1])]


def as_squares(indices: Tensor) -> Tensor:
    side = int(indices.shape[1] ** 0.5)
    return indices.unflatten(1, (side, side)).flatten(1, 2)


def change_modes(*_: Any) -> None:
    torch.set_grad_enabled(True)
    torch.use_deterministic_algorithms(True)


def leave(*_: Any) -> None:
    raise SystemExit(0)


def need_two(source: Tensor, keys: Tensor, window: Window) -> None:
    assert len(window.keyframes) > 1


def saying(*words: object) -> Propagation:
    """The paper's kernel, whose `cache_key` is one word after the other."""
    every = itertools.cycle(words)
    return type("Broken", (NNField,), {"cache_key": lambda self: next(every)})()


CALLS = itertools.count()
BROKEN_KERNELS: list[tuple[str, Propagation, str]] = [
    ("index_range", spoilt(lambda i: i + 1000), "indices from 0 to 31"),
    ("index_range", kernel(lambda _, s, k, __: s @ k[0].T), "expected a Correspondence, got Tenso"),
    (
        "index_range",
        spoilt(lambda i: i[:, :1], lambda w: w[:, :1]),
        r"indices of shape \(6, 16, taps\), got \(6, 1, 2",
    ),
    ("index_range", acting(leave), "expected no exception, got SystemExit: 0"),
    ("non_negative", spoilt(weights=lambda w: 3 * w - 1), "weights of 0 or more"),
    ("rows_sum_to_one", spoilt(weights=lambda w: 0.9 * w), r"got sums from 0\.9 to 0\.9; divide"),
    ("device_and_dtype", acting(lambda s, k, _: s @ k[0].T.float()), "no exception, got RuntimeEr"),
    ("device_and_dtype", spoilt(weights=lambda w: w.bfloat16()), "rows of weights that sum to 1"),
    (
        "device_and_dtype",
        kernel(lambda found, *_: Widening(found.indices, found.weights)),
        "bfloat16, got torch.float32; do not override",
    ),
    ("determinism", spoilt(at_random), "draw nothing at random"),
    ("determinism", spoilt(lambda i: i.roll(next(CALLS), 1)), "keep nothing between calls"),
    ("calls_independent", Caching(), "keep nothing between calls"),
    ("calls_independent", CachingForAll(), "keep nothing between calls"),
    ("inputs_unchanged", acting(lambda s, k, _: k.sub_(1)), "work on a copy"),
    ("global_state_unchanged", acting(lambda *_: np.random.seed(3)), "another NumPy's random"),
    ("global_state_unchanged", acting(lambda *_: torch.manual_seed(3)), "another torch's random"),
    ("global_state_unchanged", acting(change_modes), "gradient mode and torch's deterministic"),
    (
        "branch_order",
        kernel(lambda found, *_: FirstBranch(found.indices, found.weights)),
        "in any order",
    ),
    ("non_square_sites", spoilt(as_squares), "expected no exception"),
    ("one_frame_windows", acting(need_two), "expected no exception, got AssertionError"),
    (
        "frames_independent",
        spoilt(weights=lambda w: w.mean(0, keepdim=True).expand_as(w)),
        "treat every frame on its own",
    ),
    (
        "cache_key_as_text",
        saying("1", "2", "3"),
        r"the same text at every time, got \['1', '2', '3",
    ),
    ("cache_key_as_text", saying(5), r"the same text at every time, got \[5, 5, 5\]; make it a"),
    ("identity_at_keyframes", kernel(next_tokens), "or set identity_at_keyframes = False"),
    ("configuration_round_trip", UntypedKernel(), "named and typed, got block=7"),
    ("configuration_round_trip", ByFunction(), "got similarity: .*Callable.* could call functions"),
    ("configuration_round_trip", ByAnything(), "got similarities: .*Any"),
    ("interface_stated", Caching(), "a class that states interface = 2, got None; write"),
]


@pytest.mark.parametrize(("check", "broken", "message"), BROKEN_KERNELS)
def test_a_broken_kernel_fails_its_check(check: str, broken: Propagation, message: str) -> None:
    assert_fails(kernel_checks(broken), check, message)


@pytest.mark.parametrize("seed", range(4))
def test_a_seed_is_noticed_whatever_was_seeded_before(seed: int) -> None:
    np.random.seed(seed)
    torch.manual_seed(seed)
    for act, message in ((np.random.seed, "NumPy's"), (torch.manual_seed, "torch's")):
        checks = kernel_checks(acting(lambda *_, act=act: act(3)))  # type: ignore[misc]
        assert_fails(checks, "global_state_unchanged", f"another {message} random")


def test_every_kernel_check_can_fail() -> None:
    names = {check.__name__ for check in kernel_checks(NNField())}
    assert names == {check for check, _, _ in BROKEN_KERNELS}


class Shifted(NNField):
    """Every token takes the one after its match, which it does not deny."""

    interface = 2
    identity_at_keyframes = False

    def correspond(self, source: Tensor, keys: Tensor, window: Window) -> Correspondence:
        return next_tokens(super().correspond(source, keys, window), source)


def test_identity_is_checked_only_where_it_is_claimed() -> None:
    check_kernel(Shifted())


class Mode(Enum):
    """An option's type of a plugin's own module."""

    PLAIN = "plain"
    TWICE = "twice"


class ByMode(NNField):
    """The paper's kernel, if it knows its own option again."""

    interface = 2

    def __init__(self, mode: Mode = Mode.PLAIN) -> None:
        super().__init__()
        self.mode = mode

    def correspond(self, source: Tensor, keys: Tensor, window: Window) -> Correspondence:
        found = super().correspond(source, keys, window)
        return found if self.mode is Mode.PLAIN else Correspondence(found.indices, -found.weights)


def test_a_plugin_is_made_anew_with_the_classes_of_its_module() -> None:
    check_kernel(ByMode())


class NoOptions(NNField):
    interface = 2

    def __init__(self) -> None:
        super().__init__()


def test_a_plugin_without_options_passes() -> None:
    check_kernel(NoOptions())


def test_one_call_stops_at_the_first_failure() -> None:
    with pytest.raises(AssertionError, match=r"^rows_sum_to_one: "):
        check_kernel(spoilt(weights=lambda w: 0.9 * w))


def editor(**methods: Any) -> Editor:
    """A PnP some of whose methods are others."""
    return type("Broken", (PnP,), methods)()


def starting(start: Callable[[Source, Schedule, int], Any]) -> Editor:
    return editor(start=lambda self, *given: start(*given))


def preparing(prepare: Callable[[Any, Clip], Any]) -> Editor:
    return editor(prepare=lambda self, *given: prepare(*given))


def advancing(advance: Callable[[Tensor], Tensor]) -> Editor:
    return editor(advance=lambda self, x, *_: advance(x))


def conditioned(conditioning: Callable[[Batch], Any]) -> Editor:
    return editor(conditioning=lambda self, batch: conditioning(batch))


def given(model_inputs: Callable[[Batch], Any], **more: Any) -> Editor:
    return editor(model_inputs=lambda self, batch: model_inputs(batch), **more)


def attending(processor: Any, name: str = "") -> Editor:
    """Of all cross-attention, or of the layer that has the name."""
    return editor(
        cross_attention=lambda self, model: dict.fromkeys(
            [name] if name else model.cross_attention(), processor
        )
    )


LAYER = "up_blocks.1.resnets.1.conv2"


def injecting(function: Any, layer: str = LAYER, end: float = 1.0) -> Editor:
    return editor(injections=lambda self, model: [Injection(layer, function, end=end)])


def residual(batch: Batch, value: Tensor) -> dict[str, Any]:
    """A mid-block residual of one value per frame, in every branch."""
    size = [side // 8 for side in batch.latents.shape[-2:]]
    value = value.repeat(len(batch.branches)).view(-1, 1, 1, 1).expand(-1, 16, *size)
    none = [value.new_zeros(1)] * 8
    return {"mid_block_additional_residual": value, "down_block_additional_residuals": none}


def of_own_numbers(source: Source, schedule: Schedule, seed: int) -> Start:
    """Takes the first frame that a rank has for the clip's first."""
    own = [torch.Generator().manual_seed(seed + i) for i in range(len(source))]
    return Start(torch.stack([torch.randn(source.clean.shape[1:], generator=g) for g in own]))


def of_all_frames(source: Source, schedule: Schedule, seed: int) -> Start:
    generator = torch.Generator().manual_seed(seed)
    return Start(torch.randn(source.clean.shape, generator=generator))


def seeding(source: Source, schedule: Schedule, seed: int) -> Start:
    torch.manual_seed(seed)
    return Start(torch.randn_like(source.clean))


def hook(*_: Any) -> None:
    """Does nothing, but is there."""


def write_pass(batch: Batch) -> dict[str, Any]:
    batch.latents[1:].mul_(1.5)
    return {}


class CountsCalls(PnP):
    """Spoils what comes after the third call of a clip's edit."""

    def start(self, source: Source, schedule: Schedule, seed: int) -> Start:
        self.calls = 0
        return super().start(source, schedule, seed)

    def injections(self, model: Backbone) -> Sequence[Injection]:
        return [Injection(LAYER, self.spoil)]

    def spoil(self, edited: Tensor, source: Tensor, batch: Batch) -> Tensor:
        self.calls += 1
        return edited if self.calls < 4 else edited * 0.5


class CountsClips(PnP):
    clips = 0

    def prepare(self, model: Backbone, clip: Clip) -> None:
        self.clips += 1

    def start(self, source: Source, schedule: Schedule, seed: int) -> Start:
        return Start(source.at(0) * (1 + 0.01 * self.clips))


class CountsKeys(PnP):
    calls = 0

    def cache_key(self, frame: int) -> str:
        self.calls += 1
        return f"{self.calls}"


class FirstClip(PnP):
    """Mixes in the first clip that it ever saw."""

    seen: Tensor | None = None

    def prepare(self, model: Backbone, clip: Clip) -> None:
        if self.seen is None:
            self.seen = model.encode(clip.frames)

    def start(self, source: Source, schedule: Schedule, seed: int) -> Start:
        assert self.seen is not None
        return Start((source.at(0) + self.seen[list(source.frames)]) / 2)


EARLIER: dict[int, Tensor] = {}


class FirstLatents(SDEdit):
    """Starts every clip from the latents of the first one that any editor has seen."""

    def start(self, source: Source, schedule: Schedule, seed: int) -> Start:
        begin = super().start(source, schedule, seed)
        kept = map(EARLIER.setdefault, source.frames, begin.latents)
        return replace(begin, latents=torch.stack([*kept]))


class NumbersFrames(PnP):
    """Takes positions in the clip for numbers of the frames that it was shown."""

    def prepare(self, model: Backbone, clip: Clip) -> None:
        self.seen = model.encode(clip.frames[:])

    def model_inputs(self, batch: Batch) -> dict[str, Any]:
        assert self.seen[list(batch.frames)].isfinite().all()
        return {}

    def advance(self, x: Tensor, outputs: Any, step: Step, source: Source) -> Tensor:
        return (x + self.seen[list(source.frames)]) / 2


class ShowsFirst(PnP):
    """Takes the first frame that it was shown for the clip's."""

    def prepare(self, model: Backbone, clip: Clip) -> None:
        self.first = model.encode(clip.frames[:1])

    def injections(self, model: Backbone) -> Sequence[Injection]:
        return [Injection(LAYER, lambda edited, source, batch: edited + self.first.mean())]

    def advance(self, x: Tensor, outputs: Any, step: Step, source: Source) -> Tensor:
        return (x + self.first) / 2


class AnyOptions(PnP):
    def __init__(self, **options: float) -> None:
        super().__init__(**options)  # type: ignore[arg-type]


ONES = torch.ones(2)


class TensorOption(PnP):
    def __init__(self, weights: Tensor = ONES) -> None:
        super().__init__()


class ReadsSource(PnP):
    """Reads the source's output and says that it needs none."""

    needs_source = False

    def advance(self, x: Tensor, outputs: Any, step: Step, source: Source) -> Tensor:
        return super().advance(x, outputs, step, source) + 0 * outputs["source"]


class AddsSource(ReadsSource):
    """Adds the source's output where it is there."""

    def advance(self, x: Tensor, outputs: Any, step: Step, source: Source) -> Tensor:
        return Editor.advance(self, x, outputs, step, source) + outputs.get("source", 0)


BROKEN_EDITORS: list[tuple[str, Editor, str]] = [
    ("branches_with_prompts", editor(branches=lambda *_: {"source": ""}), "and an edited one, wit"),
    ("branches_with_prompts", editor(branches=lambda *_: ["a", "b"]), r"got \['a', 'b'\]; return"),
    ("start_shape", starting(lambda *_: None), "a Start, got NoneType"),
    (
        "start_shape",
        starting(lambda source, *_: Start(source.at(0)[1:])),
        r"shape \(4, 4, 8, 16\), got \(3, 4, 8, 16\); start from",
    ),
    ("start_shape", starting(lambda source, *_: Start(source.at(0) / 0)), "finite first latents"),
    (
        "step_of_the_schedule",
        starting(lambda source, *_: Start(source.at(0), 2)),
        "a step from 0 to 1, got 2; count from",
    ),
    ("start_per_frame", starting(of_all_frames), "draw noise by source.frames"),
    (
        "start_per_frame",
        starting(lambda source, *_: Start(source.at(0), min(source.frames[0], 1))),
        r"got 1 where it has frames \[1, 2, 3\] alone, else 0; choose it",
    ),
    (
        "answers_keep_shape_and_dtype",
        injecting(lambda edited, source, batch: edited, end=50.0),
        "Injections into the model's layers, 0 <= begin <= end <= 1",
    ),
    (
        "answers_keep_shape_and_dtype",
        injecting(lambda edited, source, batch: edited, layer="no.layer"),
        r"as number 0; take the names from model\.layers",
    ),
    (
        "answers_keep_shape_and_dtype",
        injecting(lambda edited, source, batch: source[None]),
        "the function must return all edited",
    ),
    (
        "answers_keep_shape_and_dtype",
        injecting(lambda edited, source, batch: edited.float()),
        "of dtype torch.bfloat16, got torch.float32",
    ),
    ("answers_keep_shape_and_dtype", injecting(lambda *_: None), "in a tensor, got NoneType"),
    ("answers_keep_shape_and_dtype", attending(leave, "attn9"), r"got \['attn9'\]; choose from"),
    ("answers_keep_shape_and_dtype", attending(None), "got something that is no function"),
    (
        "answers_keep_shape_and_dtype",
        attending(lambda batch, site, x, **given: x[:1]),
        r"in cross_attention: expected the layer's output of shape \(12, .* got \(1, ",
    ),
    (
        "answers_keep_shape_and_dtype",
        editor(inputs=lambda self, x, *_: x),
        r"inputs of all branches of shape \(3, 4, 4, 8, 16\), got \(4, 4, 8, 16\)",
    ),
    (
        "answers_keep_shape_and_dtype",
        editor(kept=lambda self, step, source: source.clean[:1]),
        r"latents from kept\(\) of shape \(4, 4, 8, 16\), got \(1, 4, 8, 16\)",
    ),
    ("answers_keep_shape_and_dtype", conditioned(lambda _: {}), "a Conditioning, got dict"),
    (
        "answers_keep_shape_and_dtype",
        conditioned(lambda batch: batch.conditioning.rows([0])),
        "embeddings with 12 rows, got embeddings with 1 rows",
    ),
    ("answers_keep_shape_and_dtype", given(lambda _: None), "a dict of network inputs, got NoneTy"),
    ("answers_keep_shape_and_dtype", given(lambda _: {"sample": 1}), r"got \['sample'\]"),
    ("result_shape", advancing(lambda x: x[: len(x) // 2]), "in advance: expected"),
    ("result_shape", advancing(lambda x: x / 0), "NaN or infinite values"),
    (
        "result_shape",
        conditioned(lambda batch: batch.conditioning.rows([0, *range(1, 3 * len(batch.frames))])),
        "in conditioning: IndexError",  # there is one branch alone in inversion
    ),
    (
        "backbone_restored",
        preparing(lambda model, _: model.unet.conv_in.register_forward_hook(hook)),
        "got other hooks of the network; return changes",
    ),
    (
        "backbone_restored",
        preparing(lambda model, _: model.unet.conv_out.register_full_backward_hook(hook)),
        "got other hooks of the network",
    ),
    (
        "backbone_restored",
        preparing(lambda model, _: model.unet.conv_in.bias.data.add_(1e-3)),
        "got other weights of the network",
    ),
    (
        "backbone_restored",
        preparing(lambda model, _: setattr(model.vae, "forward", model.vae.decode)),
        "got other methods of the vae",
    ),
    (
        "backbone_restored",
        preparing(lambda model, _: model.text_encoder.train()),
        "got other training flags of the text_encoder",
    ),
    (
        "backbone_restored",
        preparing(lambda model, _: model.scheduler.alphas_cumprod.mul_(0.9)),
        "got other noise schedule",
    ),
    (
        "backbone_restored",
        preparing(lambda model, _: model.unet.set_attn_processor(AttnProcessor())),
        "got other attention processors of the network",
    ),
    (
        "source_branch_unchanged",
        injecting(lambda edited, source, batch: source.mul_(1.1).expand_as(edited)),
        "do not write into the source",
    ),
    (
        "source_branch_unchanged",
        given(
            lambda batch: {} if batch.inversion else residual(batch, torch.ones(len(batch.frames)))
        ),
        "condition its branch as in inversion",
    ),
    (
        "source_branch_unchanged",
        attending(lambda batch, site, x, **given: site.plain(x, **given) * 0),
        "a difference of ",
    ),
    (
        "source_condition_stated",
        given(
            lambda batch: residual(batch, torch.ones(len(batch.frames))), conditions_source=False
        ),
        r"no effect on inversion's pass .* at step 0; change nothing where batch.inversion",
    ),
    (
        "injections_have_an_effect",
        injecting(lambda edited, source, batch: edited, layer="up_blocks"),  # a list of layers
        "a layer that runs, got up_blocks, which no pass calls",
    ),
    (
        "cache_key_of_frames",
        editor(cache_key=lambda self, frame: frame),
        r"to return text, got \[0, 1, 2, 3, 0, 1, 2, 3\]; return a",
    ),
    ("cache_key_of_frames", CountsKeys(), "the same cache key of a frame at every time"),
    (
        "frames_independent_of_the_pass",
        given(lambda batch: residual(batch, torch.arange(len(batch.frames)).float())),
        "go by batch.frames",
    ),
    (
        "frames_independent_of_the_pass",
        injecting(lambda edited, source, batch: edited.mean(1, keepdim=True).expand_as(edited)),
        "depends on the batch",
    ),
    ("frames_independent_of_the_pass", NumbersFrames(), "in model_inputs: IndexError"),
    ("frames_independent_of_the_pass", ShowsFirst(), r"frames \[1, 2, 3\] alone on a rank"),
    ("batch_independent", CountsCalls(), "keep nothing from one call to the next"),
    ("advance_per_frame", advancing(lambda x: x - x.mean(0)), "treat every frame on its own"),
    ("advance_per_frame", advancing(lambda x: x.mul_(0.9)), "changed in place"),
    ("advance_per_frame", advancing(lambda x: x.double()), "of dtype torch.float32, got torch.flo"),
    ("advance_per_frame", NumbersFrames(), "no exception, got IndexError"),
    ("advance_per_frame", ShowsFirst(), r"\[1, 2, 3\] alone on a rank; go by source\.frames"),
    ("two_ranks_agree", starting(of_own_numbers), r"got a difference of \d.*; go by positions"),
    (
        "two_ranks_agree",
        starting(lambda source, *_: Start(source.at(0), min(source.frames[0], 1))),
        "as many steps, got one that ends before another; choose",
    ),
    ("same_without_the_source", ReadsSource(), "KeyError: 'source' .*; let needs_source be True"),
    ("same_without_the_source", AddsSource(), r"got a difference of \d.*; let needs_source be"),
    ("determinism_from_the_seed", starting(lambda s, *_: Start(torch.randn_like(s.clean))), "draw"),
    ("determinism_from_the_seed", CountsClips(), "from one clip to the next"),
    ("clips_independent", FirstClip(), "whatever is kept of a clip"),
    ("clips_independent", FirstLatents(), "whatever is kept of a clip"),
    ("global_state_unchanged", starting(seeding), "another torch's random state"),
    ("inputs_unchanged", given(write_pass), "every pass left as they were"),
    (
        "inputs_unchanged",
        starting(lambda source, *_: Start(source.trajectory.latents[0].mul_(1.01))),
        "work on a copy",
    ),
    ("configuration_round_trip", AnyOptions(), r"got \*\*options: "),
    ("configuration_round_trip", TensorOption(), "expected"),
    ("interface_stated", CountsKeys(), "a class that states interface = 2, got None; write"),
]


@pytest.mark.parametrize(("check", "broken", "message"), BROKEN_EDITORS)
def test_a_broken_editor_fails_its_check(check: str, broken: Editor, message: str) -> None:
    assert_fails(editor_checks(broken), check, message)


def test_every_editor_check_can_fail() -> None:
    assert set(EDITOR_CHECKS) == {check for check, _, _ in BROKEN_EDITORS}


class OnlyProjections(PnP):
    """Injects into projections of self-attention alone, which have no effect on windows."""

    def injections(self, model: Backbone) -> Sequence[Injection]:
        layers = [*model.layers("queries"), *model.layers("keys")]
        return [one for one in super().injections(model) if one.layer in layers]


def test_injections_into_projections_are_nothing_wrong() -> None:
    (check,) = [
        check
        for check in editor_checks(OnlyProjections())
        if check.__name__ == "injections_have_an_effect"
    ]
    assert check.plugin.injections(tiny_backbone())
    check()


class Forked(PnP):
    """Draws by torch's own random state, and puts that back."""

    def start(self, source: Source, schedule: Schedule, seed: int) -> Start:
        noise = []
        for frame in source.frames:
            with torch.random.fork_rng():
                torch.manual_seed(seed + frame)
                noise.append(torch.randn(source.clean.shape[1:]))
        return Start(torch.stack(noise))


def test_ranks_do_not_see_each_others_random_state() -> None:
    (check,) = [one for one in editor_checks(Forked()) if one.__name__ == "two_ranks_agree"]
    for _ in range(2):
        check()


def test_a_refusal_of_the_plugin_is_a_failure_that_quotes_it() -> None:
    def refuse(model: Backbone, clip: Clip) -> None:
        raise InputError("needs 8 frames")

    with pytest.raises(ConformanceError, match="no exception, got InputError: needs 8 frames"):
        check_editor(preparing(refuse))
