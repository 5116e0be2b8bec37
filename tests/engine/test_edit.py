import dataclasses
import inspect
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tokenflow
from tokenflow.diffusion import Backbone, Schedule, Source, StableDiffusion, guide, invert
from tokenflow.editors import DDCM, Batch, Editor, FlowEdit, Injection, PnP, Prompts, Start, Step
from tokenflow.editors.sdedit import frame_noise
from tokenflow.engine import Result, Settings, edit_clip, edit_latents
from tokenflow.engine.resume import ResumeStore
from tokenflow.errors import DivergedError, InputError, PluginError, Preempted
from tokenflow.metrics import psnr
from tokenflow.propagation import Correspondence, NNField, Propagation, Window
from tokenflow.storage.cache import Cache
from tokenflow.testing import editor_checks
from tokenflow.video import Clip

PROMPT, SOURCE = "a blue ball", "a ball"
EVERY_WAY = ("tokenflow", "joint", "none")


# float32 through two steps of a network, guided by 7.5, with sums in another order; measured 1e-5
ROUNDING = 1e-4


def random_clip(frames: int) -> Clip:
    generator = torch.Generator().manual_seed(1)
    return Clip.from_frames(torch.rand(frames, 3, 16, 16, generator=generator), name="noise")


def edit(
    backbone: Backbone,
    clip: Clip,
    editor: Editor | None = None,
    kernel: Propagation | None = None,
    prompts: Prompts = Prompts(PROMPT, "", SOURCE),  # noqa: B008 (it is frozen)
    options: dict[str, Any] | None = None,
    **settings: Any,
) -> Result:
    """Two steps with windows of four frames by default."""
    chosen = Settings(**{"steps": 2, "keyframe_every": 4, **settings})
    return edit_clip(
        backbone, clip, prompts, editor or PnP(), kernel or NNField(), chosen, **(options or {})
    )


class Steps:
    """Keeps what is reported, and asks to stop at one step of a stage."""

    def __init__(self, stop: tuple[str, int] | None = None) -> None:
        self.calls: list[tuple[str, int, int]] = []
        self.stop = stop

    def __call__(self, stage: str, step: int, steps: int) -> Any:
        self.calls.append((stage, step, steps))
        return "stop" if (stage, step) == self.stop else None

    def of(self, stage: str) -> list[int]:
        """The steps of a stage."""
        return [step for name, step, _ in self.calls if name == stage]


def difference(a: Result, b: Result) -> float:
    return float((a.clip.frames - b.clip.frames).abs().max())


@pytest.mark.parametrize("frames", [1, 2, 5, 9])
@pytest.mark.parametrize("consistency", EVERY_WAY)
def test_every_frame_is_edited(backbone: Backbone, frames: int, consistency: str) -> None:
    clip = random_clip(frames)
    edited = edit(backbone, clip, consistency=consistency).clip
    assert edited.frames.shape == clip.frames.shape
    assert edited.frames.isfinite().all()
    assert 0 <= edited.frames.min() <= edited.frames.max() <= 1
    changed = (edited.frames - clip.frames).abs().amax(dim=(1, 2, 3))
    assert (changed > 0.01).all()
    for name in ("name", "times", "rate", "display_size"):
        assert getattr(edited, name) == getattr(clip, name)


def test_frames_need_not_be_square(backbone: Backbone, clip: Clip) -> None:
    assert edit(backbone, clip).clip.frames.shape == (9, 3, 16, 32)


class Recording(NNField):
    """The paper's kernel, which keeps the windows that it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.windows: list[tuple[Window, int, int]] = []

    def correspond(self, source: Tensor, keys: Tensor, window: Window) -> Correspondence:
        assert len(source) == len(window.frames)
        assert len(keys) == len(window.keyframes)
        self.windows.append((window, source.shape[1], keys.shape[1]))
        return super().correspond(source, keys, window)


def test_a_kernel_is_told_every_frame_and_size(backbone: Backbone, clip: Clip) -> None:
    kernel = Recording()
    edit(backbone, clip, kernel=kernel, steps=1, batch=9)
    assert len(kernel.windows) == len(backbone.sites())
    sizes = [(window.height, window.width) for window, _, _ in kernel.windows]
    assert set(sizes) == {(8, 16), (4, 8), (2, 4), (1, 2)}
    for window, tokens, key_tokens in kernel.windows:
        assert window.height * window.width == tokens == key_tokens
        assert window.frames == tuple(f for f in range(9) if f not in window.keyframes)
        assert len(window.keyframes) == 3


@pytest.mark.parametrize("consistency", EVERY_WAY)
def test_a_static_clip_stays_static(backbone: Backbone, consistency: str) -> None:
    frame = random_clip(1).frames
    still = Clip.from_frames(frame.expand(5, -1, -1, -1).clone())
    frames = edit(backbone, still, consistency=consistency, batch=5).clip.frames
    assert (frames - frames[:1]).abs().max() < ROUNDING


@pytest.mark.parametrize("consistency", ["joint", "tokenflow"])
def test_consistency_changes_nothing_in_a_static_clip(backbone: Backbone, consistency: str) -> None:
    frame = random_clip(1).frames
    still = Clip.from_frames(frame.expand(5, -1, -1, -1).clone())
    alone = edit(backbone, still, consistency="none")
    assert difference(edit(backbone, still, consistency=consistency), alone) < ROUNDING


def test_the_ways_of_consistency_differ_where_frames_do(backbone: Backbone) -> None:
    results = [edit(backbone, random_clip(5), consistency=way) for way in EVERY_WAY]
    for one, other in itertools.combinations(results, 2):
        assert difference(one, other) > 100 * ROUNDING


@pytest.mark.parametrize("consistency", EVERY_WAY)
def test_networks_in_half_precision(model_folder: Path, consistency: str) -> None:
    half = Backbone.load(model_folder, device="cpu", dtype="bfloat16")
    frames = edit(half, random_clip(5), consistency=consistency).clip.frames
    assert frames.dtype == torch.float32
    assert frames.isfinite().all()


def test_windows_of_one_frame_are_joint_attention(backbone: Backbone) -> None:
    """With every frame a keyframe, each takes its own joint output."""
    clip = random_clip(5)
    joint = edit(backbone, clip, consistency="joint")
    every = edit(backbone, clip, keyframe_every=1, fusion=0.0)
    assert difference(joint, every) < ROUNDING


def test_a_seed_gives_one_result(backbone: Backbone) -> None:
    clip = random_clip(5)
    first = edit(backbone, clip, seed=3)
    torch.manual_seed(99)
    assert torch.equal(edit(backbone, clip, seed=3).clip.frames, first.clip.frames)
    assert first.settings.seed == 3
    assert difference(edit(backbone, clip, seed=4), first) > 10 * ROUNDING


def test_the_clips_name_counts_in_the_draws(backbone: Backbone) -> None:
    clip = random_clip(9)
    renamed = dataclasses.replace(clip, name="other")
    assert difference(edit(backbone, clip), edit(backbone, renamed)) > 10 * ROUNDING


def test_fixed_keyframes_do_not_depend_on_the_seed(backbone: Backbone) -> None:
    clip = random_clip(5)
    one, other = (edit(backbone, clip, keyframes="center", seed=s) for s in (0, 1))
    assert torch.equal(one.clip.frames, other.clip.frames)


def test_a_span_of_the_whole_clip_is_full_attention(backbone: Backbone) -> None:
    clip, bounded = random_clip(9), {"keyframe_every": 2, "keyframe_attention": "windowed"}
    full = edit(backbone, clip, keyframe_every=2, keyframe_attention="full")
    whole = edit(backbone, clip, **bounded, span=5)
    assert torch.equal(whole.latents, full.latents)
    shorter = [edit(backbone, clip, **bounded, span=2, anchors=n) for n in (0, 1)]
    for one, other in itertools.combinations([full, *shorter], 2):
        assert difference(one, other) > 10 * ROUNDING


@pytest.mark.parametrize("consistency", ["tokenflow", "none"])
def test_batch_changes_nothing(backbone: Backbone, consistency: str) -> None:
    clip = random_clip(5)
    whole = edit(backbone, clip, batch=8, consistency=consistency)
    for batch in (1, 3):
        other = edit(backbone, clip, batch=batch, consistency=consistency)
        assert difference(other, whole) < ROUNDING


@pytest.mark.parametrize(
    ("editor", "settings"),
    [
        (PnP(), {"neighbours": "previous"}),
        (PnP(start_from="renoised"), {"inversion_steps": 5}),
        (PnP(), {"blend": "linear"}),
        (PnP(), {"keyframes": 3}),
        (PnP(), {"guidance": 1.0}),
        (PnP(), {"guidance_end": 0.5}),
        (PnP(), {"inversion_solver": "uni-inv"}),
        (PnP(feature_layers=3), {}),
        (PnP(attention=0.0), {}),
        (PnP(features=0.0), {}),
    ],
)
def test_options_change_the_result(
    backbone: Backbone, editor: PnP, settings: dict[str, Any]
) -> None:
    clip = random_clip(5)
    plain = {name: value for name, value in settings.items() if name == "inversion_steps"}
    default, other = edit(backbone, clip, **plain), edit(backbone, clip, editor, **settings)
    assert other.clip.frames.isfinite().all()
    assert difference(default, other) > 10 * ROUNDING


def test_every_prompt_changes_the_result(backbone: Backbone) -> None:
    clip, plain = random_clip(2), Prompts(PROMPT, "", SOURCE)
    names = [field.name for field in dataclasses.fields(plain)]
    changed = [dataclasses.replace(plain, **{name: "a red cube"}) for name in names]
    results = [edit(backbone, clip, prompts=prompts) for prompts in (plain, *changed)]
    for one, other in itertools.combinations(results, 2):
        assert difference(one, other) > 10 * ROUNDING


def test_a_prompt_alone_is_enough(backbone: Backbone) -> None:
    clip, settings = random_clip(1), Settings(steps=1)
    with pytest.warns(UserWarning, match="the inversion prompt is empty"):
        alone = edit_clip(backbone, clip, PROMPT, PnP(), NNField(), settings)
    same = edit(backbone, clip, prompts=Prompts(PROMPT, "", ""), steps=1)
    assert torch.equal(alone.latents, same.latents)


def test_no_edit_and_no_guidance_reconstruct(backbone: Backbone) -> None:
    """Sampling under the inversion prompt at guidance 1 is `reconstruct`, frame by frame."""
    clip = random_clip(2)
    result = edit(
        backbone, clip, PnP(attention=0.0, features=0.0), prompts=Prompts(SOURCE, "", SOURCE),
        guidance=1.0, consistency="none", report_reconstruction=True,
    )  # fmt: skip
    assert result.reconstruction_psnr is not None
    # in dB; the same float32 steps in other batches
    assert psnr(result.clip.frames, clip.frames) == pytest.approx(
        result.reconstruction_psnr, abs=1e-2
    )


def test_reconstruction_is_reported_where_asked_for(backbone: Backbone) -> None:
    clip = random_clip(2)
    assert edit(backbone, clip).reconstruction_psnr is None
    result = edit(backbone, clip, report_reconstruction=True)
    assert result.reconstruction_psnr is not None
    assert result.round_trip_psnr is not None
    assert math.isfinite(result.reconstruction_psnr)
    frames = backbone.decode(backbone.encode(clip.frames))
    assert result.round_trip_psnr == pytest.approx(psnr(frames, clip.frames), abs=1e-4)
    assert set(result.seconds) == {"encode", "invert", "reconstruct", "edit", "decode"}


def test_psnr_of_a_known_error() -> None:
    # a mean squared error of 0.01 is 20 dB
    assert psnr(torch.zeros(3, 4), torch.full((3, 4), 0.1)) == pytest.approx(20, abs=1e-4)


STAGES = {"encode": 3, "invert": 9, "reconstruct": 2, "edit": 2, "decode": 3}
"""The steps of five frames in batches of two, with one inversion step more than sampling's two."""
FIVE: dict[str, Any] = {"batch": 2, "inversion_steps": 3, "report_reconstruction": True}


def test_every_step_of_every_stage_is_reported(backbone: Backbone) -> None:
    steps = Steps()
    edit(backbone, random_clip(5), options={"on_step": steps}, **FIVE)
    for stage, n in STAGES.items():
        assert [call for call in steps.calls if call[0] == stage] == [
            (stage, i, n) for i in range(1, n + 1)
        ]
    assert len(steps.calls) == sum(STAGES.values())


@pytest.fixture(scope="module")
def whole(backbone: Backbone) -> Result:
    """An edit that nobody stops."""
    return edit(backbone, random_clip(5), **FIVE)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
def test_an_edit_that_is_stopped_goes_on_bit_for_bit(
    backbone: Backbone, whole: Result, tmp_path: Path, stage: str, last: bool
) -> None:
    clip = random_clip(5)
    # no step is due for a checkpoint but the one that stops, and the last
    store = ResumeStore(Cache(tmp_path), "PnP()", "NNField()", save_every=10)
    stop = (stage, STAGES[stage] if last else 1)
    first, second = Steps(stop), Steps()
    with pytest.raises(Preempted):
        edit(backbone, clip, options={"on_step": first, "store": store}, **FIVE)
    assert first.calls[-1][:2] == stop
    again = edit(backbone, clip, options={"on_step": second, "store": store}, **FIVE)
    assert torch.equal(again.latents, whole.latents)
    assert torch.equal(again.clip.frames, whole.clip.frames)
    # of three batches, those are encoded again that were not inverted
    unfinished = {"encode": 3, "invert": 0 if last else 3}.get(stage, 0)
    assert len(second.of("encode")) == unfinished
    done = {"edit": stop[1], "decode": 2}.get(stage, 0)
    assert second.of("edit") == [step for step in (1, 2) if step > done]


@pytest.mark.parametrize("stage", ["invert", "edit", "decode"])
def test_an_edit_without_a_store_stops_as_well(backbone: Backbone, stage: str) -> None:
    steps = Steps((stage, 1))
    with pytest.raises(Preempted):
        edit(backbone, random_clip(5), options={"on_step": steps}, **FIVE)
    assert steps.calls[-1][:2] == (stage, 1)


def test_an_edit_may_stop_at_what_was_in_the_cache(backbone: Backbone, tmp_path: Path) -> None:
    clip, store = random_clip(2), ResumeStore(Cache(tmp_path))
    edit(backbone, clip, options={"store": store})
    steps = Steps(("cached", 1))
    with pytest.raises(Preempted):
        edit(backbone, clip, options={"on_step": steps, "store": store})
    assert steps.calls == [("cached", 1, 1)]


def test_few_calls_lie_between_an_edit_and_a_kernel(backbone: Backbone) -> None:
    """The method is readable from `edit_clip` down: 7 calls to `correspond`, with its own."""
    package = Path(tokenflow.__file__).parent
    depths: set[int] = set()

    class Inspecting(NNField):
        def correspond(self, source: Tensor, keys: Tensor, window: Window) -> Correspondence:
            calls = [
                frame.function
                for frame in inspect.stack(context=0)
                if Path(frame.filename).is_relative_to(package)
            ]
            depths.add(1 + calls.index("edit_clip"))
            return super().correspond(source, keys, window)

    edit(backbone, random_clip(5), kernel=Inspecting(), steps=1)
    assert len(depths) == 1
    assert 4 <= depths.pop() <= 7  # fewer than four: the frames of the package were not found


def test_inputs_are_left_alone(backbone: Backbone) -> None:
    clip = random_clip(5)
    frames = clip.frames.clone()
    edit(backbone, clip)
    assert torch.equal(clip.frames, frames)

    schedule = backbone.schedule(2)
    trajectory = invert(backbone, backbone.encode(frames), "", schedule, 3)
    before = [t.clone() for t in (trajectory.latents, trajectory.clean, trajectory.noisiest)]
    settings = Settings(steps=2, keyframe_every=4)
    edit_latents(backbone, trajectory, schedule, PROMPT, PnP(), NNField(), settings)
    after = (trajectory.latents, trajectory.clean, trajectory.noisiest)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


class Later(Editor):
    """Starts at the second of the schedule's levels, as SDEdit would."""

    interface = 2

    def start(self, source: Source, schedule: Schedule, seed: int) -> Start:
        return Start(source.at(1), 1)


def test_an_editor_may_start_later(backbone: Backbone) -> None:
    steps = Steps()
    edit(backbone, random_clip(2), Later(), steps=3, options={"on_step": steps})
    assert [call for call in steps.calls if call[0] == "edit"] == [("edit", 2, 3), ("edit", 3, 3)]


class Watching(PnP):
    """Keeps what it was given."""

    interface = 2

    def __init__(self) -> None:
        super().__init__()
        self.clips: list[Clip] = []
        self.batches: list[Batch] = []

    def prepare(self, model: Backbone, clip: Clip) -> None:
        assert not self.batches
        self.clips.append(clip)

    def model_inputs(self, batch: Batch) -> dict[str, Any]:
        self.batches.append(batch)
        return {}


def test_an_editor_is_asked_in_every_pass(backbone: Backbone) -> None:
    editor, clip = Watching(), random_clip(5)
    edit(backbone, clip, editor, batch=4, keyframes="first")
    assert editor.clips == [clip]
    source, all_three = ("source",), ("source", "negative", "prompt")
    inversion = [(source, (0, 1, 2, 3))] * 2 + [(source, (4,))] * 2
    sampling = [(all_three, (0, 4)), (all_three, (1, 2, 3))]
    assert [(b.branches, b.frames) for b in editor.batches] == inversion + 2 * sampling
    assert [(b.t, b.step, b.progress) for b in editor.batches] == (
        [(1, 1, 0.5), (501, 0, 0.0)] * 2 + [(501, 0, 0.0)] * 2 + [(1, 1, 0.5)] * 2
    )
    for b in editor.batches:
        assert b.latents.shape[:2] == (len(b.branches), len(b.frames))
        assert len(b.conditioning) == len(b.branches) * len(b.frames)


class Following(Editor):
    """Takes the source's latents in place of guidance and a step."""

    interface = 2

    def __init__(self) -> None:
        self.given: list[tuple[Tensor, Mapping[str, Tensor], Step, Source]] = []

    def advance(
        self, x: Tensor, outputs: Mapping[str, Tensor], step: Step, source: Source
    ) -> Tensor:
        self.given.append((x, outputs, step, source))
        return source.at(step.index + 1)


@pytest.mark.parametrize("consistency", EVERY_WAY)
def test_an_editor_may_replace_guidance_and_the_step(backbone: Backbone, consistency: str) -> None:
    editor, clip = Following(), random_clip(5)
    result = edit(
        backbone, clip, editor, consistency=consistency, batch=2, guidance=3.0, fusion=0.0
    )
    clean = torch.cat([backbone.encode(part) for part in clip.frames.split(2)])
    assert torch.equal(result.latents, clean)
    for index in range(2):
        here = [one for one in editor.given if one[2].index == index]
        seen = [frame for *_, source in here for frame in source.frames]
        assert sorted(seen) == list(range(5))
        for x, outputs, step, source in here:
            assert torch.equal(x, source.at(index))
            assert list(outputs) == ["source", "negative", "prompt"] == list(step.branches)
            assert all(output.shape == x.shape for output in outputs.values())
            assert (step.guidance, step.seed, len(step.schedule)) == (3.0, 0, 2)
            assert step.t == step.schedule.timesteps[index]


class TwoPrompts(PnP):
    """Two prompts, each with a weight of its own in guidance."""

    interface = 2

    def __init__(self, second: str, weight: float) -> None:
        super().__init__()
        self.second, self.weight = second, weight

    def branches(self, prompts: Prompts) -> Mapping[str, str]:
        return {**super().branches(prompts), "second": self.second}

    def advance(
        self, x: Tensor, outputs: Mapping[str, Tensor], step: Step, source: Source
    ) -> Tensor:
        mean = (1 - self.weight) * outputs["prompt"] + self.weight * outputs["second"]
        guided = guide(outputs["negative"], mean, step.guidance)
        return step.schedule.step(guided, x, step.index)


@pytest.mark.parametrize("consistency", EVERY_WAY)
def test_an_editor_may_have_two_prompts(backbone: Backbone, consistency: str) -> None:
    clip, other = random_clip(5), "a red cube"
    first, second, both = (
        edit(backbone, clip, TwoPrompts(other, weight), consistency=consistency, fusion=0.0)
        for weight in (0.0, 1.0, 0.5)
    )
    alone = edit(backbone, clip, consistency=consistency, fusion=0.0)
    others = edit(
        backbone, clip, prompts=Prompts(other, "", SOURCE), consistency=consistency, fusion=0.0
    )
    assert difference(first, alone) < ROUNDING
    assert difference(second, others) < ROUNDING
    assert difference(both, alone) > 10 * ROUNDING
    assert difference(both, others) > 10 * ROUNDING


class Direct(Editor):
    """Moves the source to the edit without inversion, as FlowEdit does (arXiv 2412.08629).

    At each level the source is noised anew, the edit as much, and the edit moves by the difference
    of the clean latents that the network sees in both.
    """

    interface = 2
    inverts = False

    def inputs(self, x: Tensor, step: Step, source: Source) -> Tensor:
        seed = step.seed + step.index
        noise = [frame_noise(seed, frame, x.shape[1:]) for frame in source.frames]
        noised = step.schedule.mix(source.clean, torch.stack(noise), step.index)
        edited = noised + step.schedule.signal[step.index] * (x - source.clean)
        return torch.stack([noised, edited, edited])

    def advance(
        self, x: Tensor, outputs: Mapping[str, Tensor], step: Step, source: Source
    ) -> Tensor:
        noised, edited, _ = self.inputs(x, step, source)
        guided = guide(outputs["negative"], outputs["prompt"], step.guidance)
        wanted, _ = step.schedule.split(guided, edited, step.index)
        there, _ = step.schedule.split(outputs["source"], noised, step.index)
        done = step.schedule.signal[step.index + 1] - step.schedule.signal[step.index]
        return x + done * (wanted - there)


@pytest.mark.parametrize("consistency", EVERY_WAY)
def test_an_editor_may_do_without_inversion(backbone: Backbone, consistency: str) -> None:
    clip, steps, options = random_clip(5), Steps(), {"consistency": consistency}
    result = edit(backbone, clip, Direct(), options={"on_step": steps}, **options)
    assert {stage for stage, *_ in steps.calls} == {"encode", "edit", "decode"}
    assert (result.latents - backbone.encode(clip.frames)).abs().amax(dim=(1, 2, 3)).min() > 0.01
    # the source's own prompt moves nothing
    same = edit(
        backbone, clip, Direct(), prompts=Prompts(SOURCE, "", SOURCE), guidance=1.0,
        consistency="none",
    )  # fmt: skip
    assert (same.latents - backbone.encode(clip.frames)).abs().max() < ROUNDING


def test_without_inversion_an_edit_is_resumed_and_is_the_same_on_two_ranks(
    backbone: Backbone, tmp_path: Path
) -> None:
    clip, store = random_clip(5), ResumeStore(Cache(tmp_path), "Direct()", "NNField()", 1)
    with pytest.raises(Preempted):
        edit(backbone, clip, Direct(), options={"on_step": Steps(("edit", 1)), "store": store})
    steps = Steps()
    again = edit(backbone, clip, Direct(), options={"on_step": steps, "store": store})
    assert steps.of("edit") == [2]
    assert torch.equal(again.latents, edit(backbone, clip, Direct()).latents)
    checks = {check.__name__: check for check in editor_checks(Direct(), backbone)}
    checks["two_ranks_agree"]()


@pytest.mark.parametrize("prompt", ["", "   \n"])
def test_an_empty_prompt(backbone: Backbone, prompt: str) -> None:
    with pytest.raises(InputError, match="the prompt is empty; say what the edited video shows"):
        edit(backbone, random_clip(1), prompts=Prompts(prompt, "", SOURCE))


@pytest.mark.parametrize(("height", "width"), [(24, 16), (16, 17), (8, 8)])
def test_frames_of_a_wrong_size(backbone: Backbone, height: int, width: int) -> None:
    clip = Clip.from_frames(torch.rand(1, 3, height, width))
    message = rf"{height}x{width}, expected multiples of 16 .* multiple=16\)"
    with pytest.raises(InputError, match=message):
        edit(backbone, clip)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"keyframe_every": 0}, "keyframe_every must be at least 1, got 0"),
        ({"batch": -1}, "batch must be at least 1, got -1"),
        ({"span": 0}, "span must be at least 1, got 0"),
        ({"anchors": -1}, "anchors must be at least 0, got -1"),
        ({"seed": 2**63}, "seed must be a number of 64 bits, got 9223372036854775808"),
        ({"steps": 5, "inversion_steps": 4}, "got inversion_steps 4 for steps 5; raise the one"),
        ({"inversion_steps": 0, "steps": 1}, "got inversion_steps 0 for steps 1"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Settings(**settings)


@pytest.mark.parametrize(
    ("settings", "editor", "message"),
    [
        ({"fusion": 0.5, "consistency": "none"}, PnP(), "expected fusion 0, got 0.5; leave it"),
        ({"fusion": 0.5, "consistency": "joint"}, PnP(), "expected fusion 0, got 0.5; leave it"),
        (
            {"fusion_end": 0.5, "consistency": "none"}, PnP(),
            "expected fusion_end 1, got 0.5; leave it out, or choose consistency tokenflow",
        ),
        ({"fusion_end": 0.5}, FlowEdit(), "leave it out, or choose fusion 0.8"),
        ({"mask_edge": 2.0}, PnP(), r"expected mask_edge 0, got 2.0; .* or give --model\.mask"),
        ({"inversion_steps": 9}, FlowEdit(), "does not invert .* got inversion_steps 9; leave"),
        (
            {"record_source": True}, DDCM(),
            "expected record_source false, the defaults, got record_source True; leave that out",
        ),
        (
            {"inversion_solver": "uni-inv", "report_reconstruction": True}, DDCM(),
            "got inversion_solver uni-inv and report_reconstruction True; .* choose an editor that",
        ),
    ],
)  # fmt: skip
def test_an_option_that_would_change_nothing(
    backbone: Backbone, settings: dict[str, Any], editor: Editor, message: str
) -> None:
    steps = Steps()
    with pytest.raises(InputError, match=message):
        edit(backbone, random_clip(2), editor, options={"on_step": steps}, **settings)
    assert not steps.calls


def test_fusion_may_be_switched_off_where_its_end_is_given() -> None:
    Settings(fusion=0.0, fusion_end=0.5).require_used(PnP(), fuses=True, mask=None)
    Settings(fusion_end=0.5).require_used(None, fuses=True, mask=None)  # the editor may fuse


def test_as_many_inversion_steps_as_sampling_steps_are_the_default() -> None:
    """As a configuration may give them that another editor is chosen over."""
    Settings(steps=9, inversion_steps=9).require_used(FlowEdit(), fuses=True, mask=None)


def test_too_many_steps_for_the_model(backbone: Backbone) -> None:
    with pytest.raises(InputError, match="expected 1 to 1000 steps, got 1001"):
        edit(backbone, random_clip(1), steps=1001)


class Broken(PnP):
    """Starts at NaN, or injects infinity at the second step."""

    interface = 2

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def start(self, source: Source, schedule: Schedule, seed: int) -> Start:
        latents = source.at(0).clone()
        if self.where == "start":
            latents[-1, 0, 0, 0] = math.nan
        return Start(latents)

    def injections(self, model: Backbone) -> Sequence[Injection]:
        def spoil(edited: Tensor, source: Tensor, batch: Batch) -> Tensor:
            return edited * math.inf if self.where == "injection" else edited

        own, last = super().injections(model), model.layers("structure")[-1]
        return [*own, Injection(last, spoil, begin=0.5)]


@pytest.mark.parametrize("consistency", EVERY_WAY)
def test_latents_that_are_not_finite(backbone: Backbone, consistency: str) -> None:
    said = r"NaN or infinite values in sampling at step 1 \(timestep 1\); .* dtype"
    with pytest.raises(DivergedError, match=said):
        edit(backbone, random_clip(2), Broken("injection"), consistency=consistency)


def test_a_start_that_is_not_finite_is_the_editors_fault(backbone: Backbone) -> None:
    with pytest.raises(PluginError, match=r"Broken .* in start: expected finite first latents"):
        edit(backbone, random_clip(2), Broken("start"))


def test_frames_that_are_not_finite(backbone: Backbone) -> None:
    clip = random_clip(2)
    clip.frames[1, 0, 0, 0] = math.nan
    with pytest.raises(DivergedError, match=r"in the encoded frames"):
        edit(backbone, clip)


@pytest.mark.parametrize(
    "name", ["neighbours", "blend", "consistency", "keyframe_attention", "inversion_solver"]
)
def test_settings_refuse_names_that_they_do_not_know(name: str) -> None:
    settings = Settings()
    object.__setattr__(settings, name, "x")  # the type checker of the tests guards the front door
    with pytest.raises(InputError, match=f"{name} must be .*'x'"):
        settings.__post_init__()


@pytest.mark.parametrize(
    ("part", "where"), [("encoder", "the encoded frames"), ("decoder", "the decoded frames")]
)
def test_nan_in_the_autoencoder_is_named(
    model_folder: Path, clip: Clip, part: str, where: str
) -> None:
    broken = Backbone.load(model_folder, "cpu", "float32")
    assert isinstance(broken, StableDiffusion)
    getattr(broken.vae, part).conv_out.bias.fill_(float("nan"))
    with pytest.raises(DivergedError, match=where):
        edit(broken, clip, steps=1)
