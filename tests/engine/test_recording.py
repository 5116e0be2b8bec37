"""The source's features recorded in inversion: sampling runs without the source from the start."""

import copy
import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.engine.test_source_cache import CASES, Mixing, counted
from tests.plugins_by_others.prompt_to_prompt import PromptToPrompt
from tokenflow.diffusion import Backbone, Trajectory, invert
from tokenflow.editors import Editor, PnP, Prompts, SDEdit
from tokenflow.engine import Settings, SourceCache, edit_clip, edit_latents
from tokenflow.engine.probe import Probe
from tokenflow.engine.ranks.group import FrameGroup
from tokenflow.engine.resume import ResumeStore
from tokenflow.errors import Preempted
from tokenflow.propagation import Correspondence, NNField, Propagation, Window
from tokenflow.storage.cache import Cache
from tokenflow.testing.threads import on_ranks
from tokenflow.testing.tiny import tiny_clip
from tokenflow.video import Clip

STEPS = 4
ROUNDING = 1e-4  # float32 in batches of other sizes, through some steps
PROMPTS = Prompts("a blue cube", inversion_prompt="a ball")
SETTINGS = Settings(steps=STEPS, keyframe_every=2, batch=3, fusion=0.0, record_source=True)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "spans": {"span": 2, "anchors": 1},
    "previous": {"neighbours": "previous"},
    "joint": {"consistency": "joint"},
    "more steps": {"inversion_steps": 6},
    "uni-inv": {"inversion_solver": "uni-inv"},
}


STOPS = [("invert", 2), ("invert", STEPS), ("edit", 3), ("edit", 1)]


def with_the_rest_in_full(cases: Iterable[Any], *chosen: Any) -> list[Any]:
    """Cases, of which all but those that are chosen are for `make test-full`."""
    return [
        case if case in chosen else pytest.param(case, marks=pytest.mark.full) for case in cases
    ]


@pytest.fixture
def clip() -> Clip:
    """Five random frames of 16×32 pixels."""
    return tiny_clip(5)


class ByPlace(Propagation):
    """Matches by frame and keyframe alone, whatever the source shows."""

    interface = 2

    def correspond(self, source: Tensor, keys: Tensor, window: Window) -> Correspondence:
        frames, tokens, _ = source.shape
        place = torch.arange(tokens).expand(frames, tokens)
        shift = torch.tensor(window.frames)[:, None] * 5 + torch.tensor(window.keyframes).sum() * 3
        both = [(place + shift) % tokens + window.neighbours[:, [side]] * tokens for side in (0, 1)]
        weights = window.blend[:, None].expand(-1, tokens, -1)
        return Correspondence(torch.stack(both, dim=-1), weights)


def edited(
    model: Backbone,
    clip: Clip,
    editor: Editor,
    kernel: Propagation,
    settings: Settings,
    **more: Any,
) -> Tensor:
    return edit_clip(model, clip, PROMPTS, editor, kernel, settings, **more).latents


@pytest.mark.parametrize("case", with_the_rest_in_full(OPTIONS, "spans", "joint", "uni-inv"))
def test_what_does_not_depend_on_the_features_is_the_same(
    backbone: Backbone, clip: Clip, case: str
) -> None:
    settings = dataclasses.replace(SETTINGS, **OPTIONS[case])
    recorded = edited(backbone, clip, SDEdit(), ByPlace(), settings)
    sampled = edited(
        backbone, clip, SDEdit(), ByPlace(), dataclasses.replace(settings, record_source=False)
    )
    assert torch.allclose(recorded, sampled, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("editor", [PnP(0.5, 0.8), Mixing()], ids=["pnp", "mixing"])
@pytest.mark.parametrize("keyframe_every", [1, 3])
def test_features_are_those_of_the_latents_that_inversion_asks_for(
    backbone: Backbone, editor: Editor, keyframe_every: int
) -> None:
    """Of a still clip, or of keyframes alone, nothing else differs from the source's branch."""
    clip = tiny_clip(3)
    if keyframe_every > 1:
        clip = Clip.from_frames(clip.frames[:1].expand(3, -1, -1, -1))
    settings = dataclasses.replace(SETTINGS, keyframe_every=keyframe_every)
    recorded = edited(backbone, clip, editor, NNField(), settings)
    schedule = backbone.schedule(STEPS)
    trajectory = inverted(backbone, clip)
    begin, asked = trajectory.at(0).clone(), [*trajectory.latents[1:], trajectory.clean]
    shifted = dataclasses.replace(trajectory, latents=torch.stack(asked))
    sampled = edit_latents(
        backbone, shifted, schedule, PROMPTS, editor, NNField(),
        dataclasses.replace(settings, record_source=False), x=begin,
    )  # fmt: skip
    assert torch.allclose(recorded, sampled, rtol=0, atol=ROUNDING)
    other = edit_latents(
        backbone, trajectory, schedule, PROMPTS, editor, NNField(),
        dataclasses.replace(settings, record_source=False),
    )  # fmt: skip
    assert (recorded - other).abs().max() > 10 * ROUNDING


def inverted(backbone: Backbone, clip: Clip) -> Trajectory:
    schedule = backbone.schedule(STEPS)
    return invert(backbone, backbone.encode(clip.frames[:]), "a ball", schedule, STEPS)


@pytest.mark.parametrize("case", with_the_rest_in_full(CASES, "pnp", "mixing", "joint"))
def test_sampling_runs_without_the_source(backbone: Backbone, clip: Clip, case: str) -> None:
    editor, kernel, options = CASES[case]
    settings = dataclasses.replace(SETTINGS, **options)
    with counted(backbone) as rows:
        found = edited(backbone, clip, editor, kernel, settings)
    with counted(backbone) as before:
        edited(backbone, clip, editor, kernel, dataclasses.replace(settings, record_source=False))
    assert found.isfinite().all()
    inversion = STEPS * len(clip)
    again = sum(rows) - inversion - 2 * (sum(before) - inversion) // 3
    # keyframes that several spans need, or that are propagated as well, are inverted more than once
    repeated = {"pnp, spans": 8, "sdedit, previous": 12}
    assert again == repeated.get(case, 0)


def test_every_frame_is_inverted_as_without(backbone: Backbone, clip: Clip, tmp_path: Path) -> None:
    found = []
    for recorded in (True, False):
        store = ResumeStore(Cache(tmp_path / str(recorded)), "PnP", "NNField")
        settings = dataclasses.replace(SETTINGS, record_source=recorded)
        edited(backbone, clip, PnP(), NNField(), settings, store=store)
        entries = [e.path for e in store.cache.entries() if e.kind == "inversion"]
        tensors = [store.cache.load(path.stem) for path in sorted(entries)]
        found.append([entry["latents"] for entry in tensors if entry is not None])
    one, other = map(torch.stack, found)
    assert one.shape[:2] == (len(clip), STEPS)
    assert torch.allclose(one, other, rtol=0, atol=ROUNDING)


class Steps:
    """Notes the steps of inversion and of the edit; stops once, after one of them."""

    def __init__(self, stop: tuple[str, int] | None = None) -> None:
        self.stop, self.taken = stop, list[tuple[str, int]]()

    def __call__(self, stage: str, step: int, steps: int) -> Any:
        self.taken += [(stage, step)] if stage in ("invert", "edit") else []
        return "stop" if (stage, step) == self.stop else None


@pytest.mark.parametrize("stop", with_the_rest_in_full(STOPS, *STOPS[:3]))
def test_an_interrupted_edit_is_resumed_bit_for_bit(
    backbone: Backbone, clip: Clip, tmp_path: Path, stop: tuple[str, int]
) -> None:
    store = ResumeStore(Cache(tmp_path), "PnP()", "NNField()", 1)
    whole = edited(backbone, clip, PnP(), NNField(), SETTINGS)
    with pytest.raises(Preempted):
        edited(backbone, clip, PnP(), NNField(), SETTINGS, store=store, on_step=Steps(stop))
    again = Steps()
    found = edited(backbone, clip, PnP(), NNField(), SETTINGS, store=store, on_step=again)
    assert torch.equal(found, whole)
    first = {("edit", step): ("edit", step + 1) for step in range(STEPS)}
    first |= {("invert", 2): ("invert", 1), ("invert", STEPS): ("edit", 1)}
    assert again.taken[0] == first[stop]


def test_another_edit_of_the_clip_neither_inverts_nor_records(
    backbone: Backbone, clip: Clip, tmp_path: Path
) -> None:
    store = ResumeStore(Cache(tmp_path), "PnP", "NNField")
    edited(backbone, clip, PnP(), NNField(), SETTINGS, store=store)
    steps, other = Steps(), dataclasses.replace(PROMPTS, prompt="a green ring")
    found = edit_clip(
        backbone, clip, other, PnP(), NNField(), SETTINGS, store=store, on_step=steps
    ).latents
    assert steps.taken == [("edit", step) for step in range(1, STEPS + 1)]
    alone = edit_clip(backbone, clip, other, PnP(), NNField(), SETTINGS).latents
    assert torch.equal(found, alone)
    # another seed draws other keyframes, whose features lack; their frames are inverted
    steps = Steps()
    more = dataclasses.replace(SETTINGS, seed=1)
    found = edited(backbone, clip, PnP(), NNField(), more, store=store, on_step=steps)
    assert ("invert", STEPS) in steps.taken
    assert torch.equal(found, edited(backbone, clip, PnP(), NNField(), more))


def test_features_of_sampling_and_of_inversion_are_kept_apart(
    backbone: Backbone, clip: Clip
) -> None:
    cache, sampled = SourceCache(), dataclasses.replace(SETTINGS, record_source=False)
    first = edited(backbone, clip, PnP(), NNField(), sampled, source_cache=cache)
    for _ in range(2):
        found = edited(backbone, clip, PnP(), NNField(), SETTINGS, source_cache=cache)
        assert len(cache.entries) == 2 * STEPS
    assert torch.equal(found, edited(backbone, clip, PnP(), NNField(), SETTINGS))
    again = edited(backbone, clip, PnP(), NNField(), sampled, source_cache=cache)
    assert torch.allclose(again, first, rtol=0, atol=ROUNDING)
    assert (again - found).abs().max() > 10 * ROUNDING


def damage(cache: Cache, entry: Path) -> None:
    entry.write_bytes(entry.read_bytes()[:-7])


def remove(cache: Cache, entry: Path) -> None:
    cache.remove(entry.stem)


@pytest.mark.filterwarnings("ignore:.* is damaged")
@pytest.mark.parametrize("harm", [damage, remove])
def test_a_step_that_is_lost_is_recorded_anew(
    backbone: Backbone, clip: Clip, tmp_path: Path, harm: Callable[[Cache, Path], None]
) -> None:
    store = ResumeStore(Cache(tmp_path), "PnP", "NNField", None)
    whole = edited(backbone, clip, PnP(), NNField(), SETTINGS, store=store)
    harm(store.cache, next(e.path for e in store.cache.entries() if e.kind == "features"))
    found = edited(backbone, clip, PnP(), NNField(), SETTINGS, store=store)
    if harm is remove:
        assert torch.equal(found, whole)
    else:  # found out in its step, which runs the source's branch
        assert found.isfinite().all()
    assert torch.equal(edited(backbone, clip, PnP(), NNField(), SETTINGS, store=store), whole)


@pytest.mark.filterwarnings("ignore:.* not all cached")
def test_where_the_cache_is_too_small_the_source_runs(
    backbone: Backbone, clip: Clip, tmp_path: Path
) -> None:
    """In the same steps each time, so that a result is the same when it is repeated or resumed."""

    def edit(folder: str, stop: tuple[str, int] | None = None) -> Tensor:
        store = ResumeStore(Cache(tmp_path / folder, gigabytes=1.5e-4), "PnP", "NNField", 1)
        result = edit_clip(
            backbone, clip, PROMPTS, PnP(), NNField(), SETTINGS, store=store, on_step=Steps(stop)
        )
        assert result.checkpoint is not None
        result.checkpoint.remove()
        kept = [e for e in store.cache.entries() if e.kind == "features"]
        assert 0 < len(kept) < STEPS
        return result.latents

    with pytest.warns(UserWarning, match="more than half of its 0.00015 GB"):
        whole = edit("whole")
    assert torch.equal(edit("whole"), whole)
    with pytest.raises(Preempted):
        edit("stopped", ("edit", 1))
    assert torch.equal(edit("stopped"), whole)


@pytest.mark.parametrize("editor", [PromptToPrompt("a red ball")])
def test_an_editor_that_needs_the_source_has_it(
    backbone: Backbone, clip: Clip, editor: Editor
) -> None:
    plain = dataclasses.replace(SETTINGS, record_source=False)
    found, expected = (
        edited(backbone, clip, editor, NNField(), settings) for settings in (SETTINGS, plain)
    )
    assert torch.equal(found, expected)


def test_a_look_changes_nothing_and_costs_a_pass_of_the_source(
    backbone: Backbone, clip: Clip, tmp_path: Path
) -> None:
    store = ResumeStore(Cache(tmp_path), "PnP", "NNField", None)
    whole = edited(backbone, clip, PnP(), NNField(), SETTINGS)
    for inversion in (STEPS, 0):
        probe, steps = Probe(backbone.sites(), range(len(clip)), STEPS), Steps()
        with counted(backbone) as rows:
            found = edited(
                backbone, clip, PnP(), NNField(), SETTINGS, store=store, look=probe, on_step=steps
            )
        assert torch.equal(found, whole)
        assert len([step for stage, step in steps.taken if stage == "invert"]) == inversion
        # keyframes, which are not propagated, are shown, too
        assert sum(rows) == len(clip) * (inversion + 2 * STEPS) + len(clip) + 3
        assert probe.seen is not None
        assert (probe.seen.step, probe.seen.frames) == (STEPS // 2, list(range(len(clip))))


@pytest.mark.parametrize("case", with_the_rest_in_full(["plain", "spans"], "spans"))
def test_two_ranks_agree_with_one(backbone: Backbone, clip: Clip, case: str) -> None:
    settings = dataclasses.replace(SETTINGS, **OPTIONS[case])
    whole = edited(backbone, clip, PnP(), NNField(), settings)

    def edit(ranks: FrameGroup) -> Tensor:
        return edited(copy.deepcopy(backbone), clip, PnP(), NNField(), settings, ranks=ranks)

    assert torch.allclose(torch.cat(on_ranks(2, edit)), whole, rtol=0, atol=ROUNDING)


def test_ranks_stop_together(backbone: Backbone, clip: Clip, tmp_path: Path) -> None:
    def edit(ranks: FrameGroup) -> str:
        steps = Steps(("invert", 2) if ranks.rank == 1 else None)
        with pytest.raises(Preempted):
            edited(
                copy.deepcopy(backbone), clip, PnP(), NNField(), SETTINGS, ranks=ranks,
                on_step=steps,
            )  # fmt: skip
        return f"{steps.taken[-1]}"

    assert on_ranks(2, edit) == ["('invert', 2)"] * 2
