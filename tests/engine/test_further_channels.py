"""Edits with networks that take more of every frame than its latents."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from tests.diffusion.making import with_channels
from tests.gaussian_flow import GaussianFlow
from tokenflow.diffusion import Backbone
from tokenflow.editors import Batch, Editor, PnP, Prompts, SDEdit
from tokenflow.engine import Settings, SourceCache, edit_clip, edit_latents
from tokenflow.engine.network import EditedNetwork
from tokenflow.engine.ranks.group import FrameGroup
from tokenflow.engine.resume import ResumeStore
from tokenflow.errors import InputError, Preempted
from tokenflow.propagation import NNField
from tokenflow.storage.cache import Cache
from tokenflow.testing import tiny_clip
from tokenflow.testing.state import backbone_state
from tokenflow.testing.threads import on_ranks
from tokenflow.testing.tiny_edit import TinyEdit
from tokenflow.video import Clip

PROMPTS = Prompts("a blue ball", "", "a ball")
FRAMES = 5
GIVEN = {"depth": 5, "mask": 9}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Backbone]:
    """A network that takes depth, and one for inpainting."""
    return {
        what: Backbone.load(
            with_channels(tmp_path_factory.mktemp(what), channels), "cpu", "float32"
        )
        for what, channels in GIVEN.items()
    }


def given(what: str, seed: int = 0) -> Clip:
    """A depth that grows from frame to frame, or a mask that moves; others by the seed."""
    frames = torch.zeros(FRAMES, 3, 16, 32)
    for number in range(FRAMES):
        if what == "depth":
            frames[number] = torch.linspace(0, 0.5, 32) + (0.1 + 0.01 * seed) * number
        else:
            at = 4 * number + 2 * seed
            frames[number, ..., at : at + 8] = 1
    return Clip.from_frames(frames)


def edited(model: Backbone, editor: Editor | None = None, **options: Any) -> Any:
    settings = {"steps": 2, "keyframe_every": 2, "batch": 3}
    names = ("consistency", "keyframe_attention", "span", "batch")
    settings |= {name: options.pop(name) for name in names if name in options}
    return edit_clip(
        model, tiny_clip(FRAMES), PROMPTS, editor or PnP(), NNField(), Settings(**settings),
        **options,
    )  # fmt: skip


@pytest.mark.parametrize("what", ["depth", "mask"])
@pytest.mark.parametrize("consistency", ["tokenflow", "joint", "none"])
def test_every_pass_has_its_frames_own(
    models: dict[str, Backbone], what: str, consistency: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, run = models[what], EditedNetwork.run
    before, seen = backbone_state(model), list[tuple[bool, tuple[int, ...], Tensor]]()
    predict = model.predict

    def watched(network: EditedNetwork, batch: Batch, *args: Any) -> Tensor:
        def predicted(*args: Any, channels: Tensor, **more: Any) -> Tensor:
            seen.append((batch.inversion, batch.frames, channels))
            return predict(*args, channels=channels, **more)

        with monkeypatch.context() as patch:
            patch.setattr(model, "predict", predicted)
            return run(network, batch, *args)

    monkeypatch.setattr(EditedNetwork, "run", watched)
    edited(model, consistency=consistency, **{what: given(what)})
    first = given(what).frames[:, :1]
    if what == "depth":
        resized = interpolate(first, (8, 16), mode="bicubic")
        expected = 2 * (resized - resized.min()) / (resized.max() - resized.min()) - 1
    else:
        expected = first[..., ::2, ::2]
    for _, frames, channels in seen:
        for branch in channels[:, :1].split(len(frames)):
            assert torch.allclose(branch, expected[list(frames)], rtol=0, atol=1e-6)
    assert {inversion for inversion, _, _ in seen} == {True, False}
    assert backbone_state(model) == before


@pytest.mark.parametrize(
    ("what", "options"), [("depth", {}), ("mask", {"keyframe_attention": "windowed", "span": 2})]
)
def test_two_ranks_are_as_one(
    models: dict[str, Backbone], what: str, options: dict[str, Any]
) -> None:
    whole = edited(models[what], **options, **{what: given(what)})

    def edit(ranks: FrameGroup) -> tuple[Tensor, Tensor]:
        model = copy.deepcopy(models[what])
        own = edited(model, ranks=ranks, **options, **{what: given(what)})
        return own.latents, own.clip.frames

    latents, frames = map(torch.cat, zip(*on_ranks(2, edit), strict=True))
    # float32 in batches of other sizes
    assert torch.allclose(latents, whole.latents, rtol=0, atol=1e-4)
    assert torch.allclose(frames, whole.clip.frames, rtol=0, atol=1e-4)


@pytest.mark.parametrize("what", ["depth", "mask"])
def test_caches_depend_on_it(models: dict[str, Backbone], what: str, tmp_path: Path) -> None:
    model, store = models[what], ResumeStore(Cache(tmp_path), "PnP", "NNField")

    def edit(seed: int, stop: int = 0, **options: Any) -> tuple[Tensor, list[str]]:
        stages: list[str] = []

        def on_step(stage: str, step: int, steps: int) -> Any:
            stages.append(f"{stage} {step}")
            return "stop" if (stage, step) == ("edit", stop) else None

        found = edited(model, on_step=on_step, store=store, **options, **{what: given(what, seed)})
        return found.latents, stages

    with pytest.raises(Preempted):
        edit(0, stop=1)
    other, stages = edit(1)
    assert {"invert 1", "edit 1"} <= set(stages)
    resumed, stages = edit(0, batch=5)  # whatever batches the VAE took
    assert "edit 2" in stages
    assert not {"invert 1", "edit 1"} & set(stages)
    fresh = edited(model, **{what: given(what)}).latents
    assert torch.allclose(resumed, fresh, rtol=0, atol=1e-4)
    assert not torch.allclose(other, fresh, rtol=0, atol=1e-2)


def test_the_sources_features_depend_on_it(models: dict[str, Backbone]) -> None:
    """The trajectory does not tell, as nothing says that it was inverted with the same depth."""
    tiny, cache = TinyEdit.of(PnP(), models["depth"]), SourceCache()
    one = torch.rand(4, 1, *tiny.trajectory.size)

    def edit(channels: Tensor, source_cache: SourceCache | None) -> Tensor:
        return edit_latents(
            tiny.model, tiny.trajectory, tiny.schedule, PROMPTS, tiny.editor, NNField(),
            Settings(steps=2, keyframe_every=2, batch=4), channels=channels,
            source_cache=source_cache,
        )  # fmt: skip

    edit(one, cache)
    entries = len(cache.entries)
    edit(one, cache)
    assert 0 < entries == len(cache.entries)
    assert torch.allclose(edit(-one, cache), edit(-one, None), rtol=0, atol=1e-5)


def test_one_frame_is_all_frames_depth(models: dict[str, Backbone]) -> None:
    one = Clip.from_frames(given("depth").frames[:1])
    every = Clip.from_frames(one.frames.repeat(FRAMES, 1, 1, 1))
    found = (edited(models["depth"], depth=depth).latents for depth in (one, every))
    assert torch.equal(*found)


def of(*size: int, value: float = 0.3) -> Clip:
    return Clip.from_frames(torch.full((size[0], 3, *size[1:]), value))


@pytest.mark.parametrize(
    ("what", "options", "message"),
    [
        ("depth", {}, r"expected the depth of the clip .* got none; give .* --model\.depth"),
        ("mask", {}, r"expected a mask for this model.* got none; give .* --model\.mask"),
        ("mask", {"mask": of(1, 16, 32), "depth": of(1, 16, 32)}, "expected no depth .* leave"),
        ("depth", {"depth": of(3, 16, 32)}, "depth of 32x16 with 1 frame or 5, .* 32x16 with 3;"),
        ("depth", {"depth": of(5, 16, 16)}, "depth of 32x16 .* got 16x16 with 5; cut and scale"),
        ("depth", {"depth": of(5, 16, 32)}, r"same everywhere \(level 76\.5 of 255\): expected"),
        ("depth", {"depth": of(1, 16, 32, value=0.0)}, r"same everywhere \(level 0 of 255\)"),
        ("mask", {"mask": of(1, 16, 32)}, "mask is black in every frame"),
    ],
)
def test_what_does_not_fit_is_refused(
    models: dict[str, Backbone], what: str, options: dict[str, Any], message: str
) -> None:
    def on_step(*args: Any) -> None:
        pytest.fail("work before the check")

    with pytest.raises(InputError, match=message):
        edited(models[what], on_step=on_step, **options)


def test_depth_for_a_model_without_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"expected no depth for this model.* leave out --model\.depth"
    ):
        edited(GaussianFlow(), depth=given("depth"))


def test_passes_of_grids_are_refused(models: dict[str, Backbone]) -> None:
    network = EditedNetwork(models["depth"], SDEdit(), PROMPTS, torch.zeros(4, 1, 8, 16))
    schedule = models["depth"].schedule(2)
    batch = network.source_batch(schedule, [0], torch.zeros(1, 4, 16, 32), 1.0)
    with pytest.raises(InputError, match=r"expected passes of single frames .* depth, got grids"):
        network.run(batch)


def test_a_network_without_channels_is_refused(models: dict[str, Backbone]) -> None:
    with pytest.raises(InputError, match=r"expected channels of mask .* got none; edit by edit_"):
        EditedNetwork(models["mask"], SDEdit(), PROMPTS)
