"""Joint and propagated editing by networks whose sequence holds text: SD 3's and Flux's."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.diffusion.making_transformers import write_tiny_flux, write_tiny_sd3
from tests.engine.test_recording import ByPlace
from tests.on_ranks import on_ranks
from tokenflow.diffusion import (
    Backbone,
    Conditioning,
    Flux,
    Schedule,
    Source,
    StableDiffusion3,
    Trajectory,
    invert,
)
from tokenflow.editors import Batch, Editor, FlowEdit, PnP, Prompts, SDEdit, Step
from tokenflow.engine import Settings, SourceCache, edit_clip, edit_latents, find_correspondences
from tokenflow.engine.network import EditedNetwork
from tokenflow.engine.ranks.group import FrameGroup
from tokenflow.errors import InputError
from tokenflow.propagation import FlowWeighted, NNField, Propagation
from tokenflow.propagation.flow.dis import DIS
from tokenflow.testing import editor_checks, tiny_clip
from tokenflow.testing.state import backbone_state
from tokenflow.video import Clip

PROMPTS = Prompts("a blue ball", "red", "a ball")
STEPS, FRAMES, SIZE = 3, 4, (4, 8)
ROUNDING = 2e-4
"""float32 through three guided steps of latents up to 10, with sums in another order."""

write = {"sd3": write_tiny_sd3, "flux": write_tiny_flux}


@pytest.fixture(scope="module", params=["sd3", "flux"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write[request.param](tmp_path_factory.mktemp(request.param))


def loaded(folder: Path) -> Backbone:
    """With short prompts, which take less time."""
    model = Backbone.load(folder, "cpu", "float32")
    assert isinstance(model, StableDiffusion3 | Flux)
    assert model.t5 is not None
    model.t5 = dataclasses.replace(model.t5, length=16)
    return model


@pytest.fixture(scope="module")
def model(folder: Path) -> Backbone:
    return loaded(folder)


def trajectory(model: Backbone, latents: Tensor) -> Trajectory:
    """As inversion might leave it: equal frames have equal noise."""
    schedule, noise = model.schedule(STEPS, SIZE), latents.flip(1, 2, 3)
    levels = torch.stack([schedule.mix(latents, noise, i) for i in range(STEPS)])
    return Trajectory(schedule.timesteps, levels, latents, levels[0])


def random_latents(frames: int = FRAMES) -> Tensor:
    return torch.randn(frames, 4, *SIZE, generator=torch.Generator().manual_seed(4))


def edited(
    model: Backbone,
    latents: Tensor,
    editor: Editor | None = None,
    prompts: Prompts = PROMPTS,
    source_cache: SourceCache | None = None,
    ranks: FrameGroup | None = None,
    **settings: object,
) -> Tensor:
    source = trajectory(model, latents)
    options = {"steps": STEPS, "keyframe_every": 2, "batch": 2, "guidance": 2.0, **settings}
    return edit_latents(
        model, source, model.schedule(STEPS, SIZE), prompts, editor or Editor(), NNField(),
        Settings(**options), source_cache=source_cache, ranks=ranks,
    )  # fmt: skip


@pytest.mark.parametrize("way", ["joint", "tokenflow"])
@pytest.mark.parametrize("attention", [0.0, 0.7])
def test_equal_frames_are_edited_as_one_alone(model: Backbone, way: str, attention: float) -> None:
    """Every token stands in the sequence as often as any other, and is matched to its like."""
    latents = random_latents(1).expand(FRAMES, -1, -1, -1)
    editor = PnP(attention, 0.0)
    alone = edited(model, latents, editor, consistency="none")
    together = edited(model, latents, editor, consistency=way)
    assert float((together - alone).abs().max()) < ROUNDING
    assert float((alone - latents).abs().max()) > 100 * ROUNDING


def test_other_frames_and_their_keyframes_have_an_effect(model: Backbone) -> None:
    ways = [edited(model, random_latents(), consistency=w) for w in ("none", "joint", "tokenflow")]
    for one, other in ((0, 1), (1, 2), (0, 2)):
        assert float((ways[one] - ways[other]).abs().max()) > 100 * ROUNDING


def test_the_batch_does_not_matter(model: Backbone) -> None:
    one, many = (edited(model, random_latents(), batch=batch) for batch in (1, FRAMES))
    assert float((one - many).abs().max()) < ROUNDING


def test_an_automatic_mask_needs_no_inversion(model: Backbone) -> None:
    clip, settings = tiny_clip(2, 32, 64), Settings(steps=2, keyframe_every=2)
    before = backbone_state(model)
    found = edit_clip(model, clip, PROMPTS, FlowEdit(2), NNField(), settings, mask="auto")
    assert found.mask is not None
    inside = found.mask.frames[:].bool()
    change = found.clip.frames - clip.frames
    assert change[inside].abs().mean() > 0.01
    assert (~inside).any()
    assert not change[~inside].any()
    assert backbone_state(model) == before


def test_an_edit_leaves_the_network_as_it_was(model: Backbone) -> None:
    model = copy.deepcopy(model)
    before, x = backbone_state(model), random_latents(2)
    conditioning = model.embed(["a", "b"])
    output = model.predict(x, 500.0, conditioning)
    settings = Settings(steps=2, keyframe_every=2, guidance=2.0)
    result = edit_clip(model, tiny_clip(3, 12, 16), PROMPTS, PnP(), NNField(), settings)
    assert result.latents.isfinite().all()
    assert backbone_state(model) == before
    assert torch.equal(model.predict(x, 500.0, conditioning), output)


@pytest.mark.parametrize("kernel", [NNField(), FlowWeighted(DIS())], ids=["nn", "flow"])
def test_a_clip_is_edited_by_each_kernel(model: Backbone, kernel: Propagation) -> None:
    settings = Settings(steps=2, keyframe_every=2, guidance=2.0)
    clip = tiny_clip(3, 32, 48)
    result = edit_clip(model, clip, PROMPTS, SDEdit(1.0, "shared"), kernel, settings)
    assert result.clip.frames.shape == clip.frames.shape


def test_injected_projections_of_all_frames_are_not_kept(model: Backbone) -> None:
    """Text tokens attend to every frame's keys: of real models gigabytes for each step."""
    cache, latents = SourceCache(), random_latents()
    first, again = (edited(model, latents, PnP(0.7), source_cache=cache) for _ in range(2))
    assert float((first - again).abs().max()) < ROUNDING
    names = {name.split("/")[0] for tables in cache.entries.values() for name in tables}
    assert names == {"#indices", "indices", "#weights", "weights", "writer"}
    assert len(cache.entries) == STEPS - int(0.7 * STEPS)  # those that inject nothing


@pytest.mark.parametrize("editor", [SDEdit(1.0), PnP(0.7)], ids=["sdedit", "pnp"])
def test_the_source_is_recorded_where_that_is_not_too_much(model: Backbone, editor: Editor) -> None:
    """Steps that inject run the source's branch, of the same latents; matches are alike in both."""
    settings = Settings(steps=STEPS, keyframe_every=2, guidance=2.0, batch=2, fusion=0.0)
    recorded, sampled = (
        edit_clip(
            model, tiny_clip(3, 12, 16), PROMPTS, editor, ByPlace(),
            dataclasses.replace(settings, record_source=record),
        ).latents
        for record in (True, False)
    )  # fmt: skip
    assert float((recorded - sampled).abs().max()) < ROUNDING


@pytest.mark.parametrize("editor", [Editor(), PnP(0.0)], ids=["plain", "PnP"])
def test_a_second_edit_runs_without_the_source(model: Backbone, editor: Editor) -> None:
    cache, latents = SourceCache(), random_latents()
    whole = edited(model, latents, editor, batch=1)
    other = dataclasses.replace(PROMPTS, prompt="a green cube")
    first = edited(model, latents, editor, other, cache, batch=1)
    assert float((whole - first).abs().max()) > 100 * ROUNDING
    rows: list[int] = []
    predict = type(model).predict

    def counted(
        self: Backbone, x: Tensor, t: float, given: Conditioning, **extra: object
    ) -> Tensor:
        rows.append(len(x))
        return predict(self, x, t, given, **extra)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "predict", counted)
        again = edited(model, latents, editor, source_cache=cache, batch=1)
    assert float((again - whole).abs().max()) < ROUNDING
    edits = 1 if "guidance" in model.embed([""]) else 2  # without a negative branch
    assert set(rows) == {edits * 2, edits}  # the keyframes, and a frame


def test_pnp_of_attention_alone(model: Backbone) -> None:
    layers = {one.layer for one in PnP().injections(model)}
    assert layers == {*model.layers("queries"), *model.layers("keys"), *model.layers("values")}
    with_source, free = (edited(model, random_latents(), editor) for editor in (PnP(), Editor()))
    assert float((with_source - free).abs().max()) > 100 * ROUNDING
    with pytest.raises(InputError, match=r"a \w+ has none: set features to 0, so that attention"):
        PnP(features=0.5).prepare(model, tiny_clip(2))


class OwnInputs(Editor):
    def inputs(self, x: Tensor, step: Step, source: Source) -> Tensor:
        return super().inputs(x, step, source)


def test_a_model_that_is_told_the_guidance_is_not_guided_again(model: Backbone) -> None:
    if "guidance" not in model.embed([""]):
        pytest.skip("this model is guided by a negative prompt")
    expected = edited(model, random_latents(), consistency="none")
    found = edited(model, random_latents(), OwnInputs(), consistency="none")
    assert torch.allclose(found, expected, rtol=0, atol=ROUNDING)


def test_the_source_is_told_a_guidance_of_one(model: Backbone) -> None:
    network = EditedNetwork(model, Told(), PROMPTS)
    if "guidance" not in network.prompts:
        assert network.branches_for(2.0) == ("source", "negative", "prompt")
        return
    assert network.branches_for(2.0) == ("source", "prompt")
    edited(model, random_latents(2), Told(), keyframe_every=1)
    told = {(batch.branches, tuple(batch.conditioning["guidance"].tolist())) for batch in Told.seen}
    assert told == {(("source", "prompt"), (1.0, 1.0, 2.0, 2.0))}
    schedule = model.schedule(STEPS, SIZE)
    batch = network.source_batch(schedule, [0], random_latents(1), schedule.timesteps[0])
    assert batch.conditioning["guidance"].tolist() == [1.0]


class Told(Editor):
    """Keeps the passes that it conditions."""

    interface = 2
    seen: list[Batch] = []  # noqa: RUF012 (of the class: an editor is copied)

    def conditioning(self, batch: Batch) -> Conditioning:
        self.seen.append(batch)
        return batch.conditioning


def test_the_noise_is_that_of_the_clips_size(model: Backbone) -> None:
    """In sampling, inversion and a probe's, whatever the size of the model's own images."""
    asked: list[tuple[int, tuple[int, int] | None]] = []
    schedule = type(model).schedule

    def watched(self: Backbone, steps: int, size: tuple[int, int] | None = None) -> Schedule:
        asked.append((steps, size))
        return schedule(self, steps, size)

    clip = tiny_clip(2, 12, 16)
    settings = Settings(steps=2, inversion_steps=3, guidance=1.0, consistency="none")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "schedule", watched)
        edit_clip(model, clip, PROMPTS, SDEdit(), NNField(), settings)
        find_correspondences(model, clip, NNField(), "a ball", settings)
        invert(model, model.encode(clip.frames[:]), "a ball", model.schedule(2, (6, 8)), 3)
    assert set(asked) == {(2, (6, 8)), (3, (6, 8))}


def test_correspondences_are_found_on_image_tokens(model: Backbone) -> None:
    frames = torch.rand(1, 3, 12, 16, generator=torch.Generator().manual_seed(0))
    clip = Clip.from_frames(frames.expand(3, -1, -1, -1))
    settings = Settings(steps=2, keyframe_every=2)
    for site, one in model.sites().items():
        if not one.matched:
            with pytest.raises(InputError, match=f"nothing is propagated at {site};"):
                find_correspondences(model, clip, NNField(), "a ball", settings, site=site)
            continue
        seen = find_correspondences(model, clip, NNField(), "a ball", settings, site=site)
        assert seen.tokens.shape[:3] == (3, 3, 4)


@pytest.mark.parametrize("name", ["backbone_restored", "injections_have_an_effect"])
def test_editors_are_checked_on_it(model: Backbone, name: str) -> None:
    (check,) = (one for one in editor_checks(PnP(), model) if one.__name__ == name)
    check()


def on_a_rank(folder: Path) -> Tensor:
    model, ranks = loaded(folder), FrameGroup.join()
    clip = tiny_clip(6, 12, 16)
    settings = Settings(
        steps=2, keyframe_every=2, guidance=2.0, batch=1, keyframe_attention="full"
    )  # fmt: skip
    results = [
        edit_clip(model, clip, PROMPTS, editor, NNField(), settings, ranks=ranks).latents
        for editor in (PnP(), FlowEdit(noise="independent"))
    ]
    return torch.stack(results, dim=1)


def test_two_ranks_agree_with_one(folder: Path, tmp_path: Path) -> None:
    halves = on_ranks(2, tmp_path / "two", on_a_rank, folder)
    whole = on_a_rank(folder)
    assert torch.cat(halves).shape == whole.shape
    assert float((torch.cat(halves) - whole).abs().max()) < ROUNDING
