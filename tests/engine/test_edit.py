import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tokenflow.diffusion import Backbone, Schedule, Trajectory, invert
from tokenflow.editors import Edit, Editor, Pass, PnP, Start
from tokenflow.engine import Result, Settings, edit_clip, edit_latents
from tokenflow.errors import DivergedError, InputError, PluginError
from tokenflow.metrics import psnr
from tokenflow.propagation import Correspondence, NNField, Propagation, Window
from tokenflow.video import Clip

PROMPT = "a blue ball"
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
    prompt: str = PROMPT,
    options: dict[str, Any] | None = None,
    **settings: Any,
) -> Result:
    """Two steps with windows of four frames, unless told otherwise."""
    return edit_clip(
        backbone,
        clip,
        prompt,
        editor or PnP(),
        kernel or NNField(),
        settings=Settings(**{"steps": 2, "keyframe_every": 4, **settings}),
        **(options or {}),
    )


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
    assert len(kernel.windows) == 16  # the self-attentions
    sizes = [(window.height, window.width) for window, _, _ in kernel.windows]
    assert set(sizes) == {(8, 16), (4, 8), (2, 4), (1, 2)}
    for window, tokens, key_tokens in kernel.windows:
        assert window.height * window.width == tokens == key_tokens
        assert window.frames == tuple(range(9))
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
    every = edit(backbone, clip, keyframe_every=1)
    assert difference(joint, every) < ROUNDING


def test_a_seed_gives_one_result(backbone: Backbone) -> None:
    clip = random_clip(5)
    first = edit(backbone, clip, seed=3)
    torch.manual_seed(99)
    assert torch.equal(edit(backbone, clip, seed=3).clip.frames, first.clip.frames)
    assert first.seed == 3
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


@pytest.mark.parametrize("name", ["negative_prompt", "inversion_prompt"])
def test_prompts_change_the_result(backbone: Backbone, name: str) -> None:
    clip = random_clip(2)
    other = edit(backbone, clip, options={name: "a red cube"})
    assert difference(edit(backbone, clip), other) > 10 * ROUNDING
    assert difference(edit(backbone, clip, prompt="a red cube"), other) > 10 * ROUNDING


def test_no_edit_and_no_guidance_reconstruct(backbone: Backbone) -> None:
    """Sampling under the inversion prompt at guidance 1 is `reconstruct`, frame by frame."""
    clip = random_clip(2)
    result = edit(
        backbone, clip, PnP(attention=0.0, features=0.0), prompt="a ball", guidance=1.0,
        consistency="none",
        options={"inversion_prompt": "a ball", "report_reconstruction": True},
    )  # fmt: skip
    assert result.reconstruction_psnr is not None
    # in dB; the same float32 steps in other batches
    assert psnr(result.clip.frames, clip.frames) == pytest.approx(
        result.reconstruction_psnr, abs=1e-2
    )


def test_reconstruction_is_reported_where_asked_for(backbone: Backbone) -> None:
    clip = random_clip(2)
    assert edit(backbone, clip).reconstruction_psnr is None
    result = edit(backbone, clip, options={"report_reconstruction": True})
    assert result.reconstruction_psnr is not None
    assert result.round_trip_psnr is not None
    assert math.isfinite(result.reconstruction_psnr)
    frames = backbone.decode(backbone.encode(clip.frames))
    assert result.round_trip_psnr == pytest.approx(psnr(frames, clip.frames), abs=1e-4)
    assert set(result.seconds) == {"encode", "invert", "reconstruct", "edit", "decode"}


def test_psnr_of_a_known_error() -> None:
    # a mean squared error of 0.01 is 20 dB
    assert psnr(torch.zeros(3, 4), torch.full((3, 4), 0.1)) == pytest.approx(20, abs=1e-4)


def test_progress_reaches_every_stages_total(backbone: Backbone) -> None:
    calls: list[tuple[str, int, int]] = []
    edit(
        backbone, random_clip(5), batch=2, inversion_steps=3,
        options={"progress": lambda *call: calls.append(call), "report_reconstruction": True},
    )  # fmt: skip
    totals = {"encode": 3, "invert": 9, "reconstruct": 2, "edit": 2, "decode": 3}
    for stage, n in totals.items():
        assert [call for call in calls if call[0] == stage] == [
            (stage, i, n) for i in range(1, n + 1)
        ]
    assert len(calls) == sum(totals.values())


def test_inputs_are_left_alone(backbone: Backbone) -> None:
    clip = random_clip(5)
    frames = clip.frames.clone()
    edit(backbone, clip)
    assert torch.equal(clip.frames, frames)

    schedule = backbone.schedule(2)
    trajectory = invert(backbone, backbone.encode(frames), "", schedule, 3)
    before = [t.clone() for t in (trajectory.latents, trajectory.clean, trajectory.noisiest)]
    settings = Settings(steps=2, keyframe_every=4)
    edit_latents(backbone, trajectory, schedule, PnP(), NNField(), PROMPT, settings=settings)
    after = (trajectory.latents, trajectory.clean, trajectory.noisiest)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


class Later(Editor):
    """Starts at the second of the schedule's timesteps, as SDEdit would."""

    def start(self, trajectory: Trajectory, schedule: Schedule, seed: int) -> Start:
        timesteps = schedule.timesteps[1:]
        return Start(trajectory.at(timesteps[0]), timesteps)


def test_an_editor_may_start_later(backbone: Backbone) -> None:
    calls: list[tuple[str, int, int]] = []
    options = {"progress": lambda *call: calls.append(call)}
    edit(backbone, random_clip(2), Later(), steps=3, options=options)
    assert [call for call in calls if call[0] == "edit"] == [("edit", 1, 2), ("edit", 2, 2)]


class Watching(PnP):
    """Keeps what it was told."""

    def __init__(self) -> None:
        super().__init__()
        self.clips: list[Clip] = []
        self.passes: list[Pass] = []

    def prepare(self, backbone: Backbone, clip: Clip) -> None:
        assert not self.passes
        self.clips.append(clip)

    def conditioning(self, forward: Pass) -> dict[str, Any]:
        self.passes.append(forward)
        return {}


def test_an_editor_is_told_of_every_pass(backbone: Backbone) -> None:
    editor, clip = Watching(), random_clip(5)
    edit(backbone, clip, editor, batch=4, keyframes="first")
    assert editor.clips == [clip]
    source, all_three = ("source",), ("source", "negative", "prompt")
    inversion = [(source, (0, 1, 2, 3))] * 2 + [(source, (4,))] * 2
    sampling = [(all_three, (0, 4)), (all_three, (0, 1, 2, 3)), (all_three, (4,))]
    assert [(p.branches, p.frames) for p in editor.passes] == inversion + 2 * sampling
    assert [(p.t, p.share) for p in editor.passes] == (
        [(1, 0.5), (501, 0.0)] * 2 + [(501, 0.0)] * 3 + [(1, 0.5)] * 3
    )
    for p in editor.passes:
        assert p.latents.shape[:2] == (len(p.branches), len(p.frames))
        assert len(p.embeddings) == len(p.branches)


@pytest.mark.parametrize("prompt", ["", "   \n"])
def test_an_empty_prompt(backbone: Backbone, prompt: str) -> None:
    with pytest.raises(InputError, match="the prompt is empty; say what the edited video shows"):
        edit(backbone, random_clip(1), prompt=prompt)


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


def test_too_many_steps_for_the_model(backbone: Backbone) -> None:
    with pytest.raises(InputError, match="expected 1 to 1000 steps, got 1001"):
        edit(backbone, random_clip(1), steps=1001)


class Broken(PnP):
    """Starts at NaN, or makes one in the UNet at a step, or asks for one as conditioning."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def start(self, trajectory: Trajectory, schedule: Schedule, seed: int) -> Start:
        start = super().start(trajectory, schedule, seed)
        if self.where != "start":
            return start
        latents = start.latents.clone()
        latents[-1, 0, 0, 0] = math.nan
        return Start(latents, start.timesteps)

    def edits(self, unet: Any) -> Sequence[Edit]:
        def spoil(edited: Tensor, source: Tensor) -> Tensor:
            return edited * math.inf if self.where == "edit" and self.t == 1 else edited

        return [*super().edits(unet), Edit(unet.up_blocks[3].resnets[0].conv2, spoil)]

    def conditioning(self, forward: Pass) -> dict[str, Any]:
        self.t = forward.t
        return {}


@pytest.mark.parametrize("consistency", EVERY_WAY)
def test_latents_that_are_not_finite(backbone: Backbone, consistency: str) -> None:
    said = r"NaN or infinite values in sampling at step 1 \(timestep 1\); .* dtype"
    with pytest.raises(DivergedError, match=said):
        edit(backbone, random_clip(2), Broken("edit"), consistency=consistency)


def test_a_start_that_is_not_finite_is_the_editors_fault(backbone: Backbone) -> None:
    with pytest.raises(PluginError, match=r"Broken .* in start: expected finite first latents"):
        edit(backbone, random_clip(2), Broken("start"))


def test_frames_that_are_not_finite(backbone: Backbone) -> None:
    clip = random_clip(2)
    clip.frames[1, 0, 0, 0] = math.nan
    with pytest.raises(DivergedError, match=r"in the encoded frames"):
        edit(backbone, clip)


@pytest.mark.parametrize("name", ["neighbours", "blend", "consistency", "keyframe_attention"])
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
    broken = Backbone.load(model_folder, device="cpu")
    getattr(broken.vae, part).conv_out.bias.fill_(float("nan"))
    with pytest.raises(DivergedError, match=where):
        edit_clip(broken, clip, "a ball", PnP(), NNField(), settings=Settings(steps=1))
