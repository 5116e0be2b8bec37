"""What a second edit of a clip takes from the first: the same result without the source."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.plugins_by_others.prompt_to_prompt import PromptToPrompt
from tokenflow.diffusion import Backbone, Trajectory, invert
from tokenflow.editors import Batch, Editor, Injection, PnP, Prompts, SDEdit
from tokenflow.engine import Settings, SourceCache, edit_clip, edit_latents
from tokenflow.engine.resume import ResumeStore
from tokenflow.engine.source_cache import described
from tokenflow.errors import InputError, Preempted
from tokenflow.propagation import FlowFiles, FlowWeighted, NNField, Propagation
from tokenflow.storage.cache import Cache
from tokenflow.storage.scratch import Spill
from tokenflow.video import Clip

PROMPTS = "a red ball", "a blue cube"
STEPS = 4


@contextmanager
def counted(backbone: Backbone) -> Iterator[list[int]]:
    """The number of rows of each pass of the network."""
    rows: list[int] = []
    hook = backbone.network.register_forward_hook(lambda _, given, __: rows.append(len(given[0])))
    yield rows
    hook.remove()


def inverted(backbone: Backbone, clip: Clip, steps: int = STEPS) -> Trajectory:
    latents, schedule = backbone.encode(clip.frames), backbone.schedule(steps)
    return invert(backbone, latents, "a ball", schedule, steps)


class Mixing(Editor):
    """Injects by a function, which is given the source's output."""

    interface = 2

    def injections(self, model: Backbone) -> Sequence[Injection]:
        layers = [*model.layers("structure")[:2], *model.layers("queries"), *model.layers("values")]
        return [Injection(layer, self.half, end=0.5) for layer in layers]

    def half(self, edited: Tensor, source: Tensor, batch: Batch) -> Tensor:
        return (edited + source) / 2


class Keys(Editor):
    """Takes the source's keys, and not its queries."""

    interface = 2

    def injections(self, model: Backbone) -> Sequence[Injection]:
        return [Injection(layer) for layer in model.layers("keys")]


CASES: dict[str, tuple[Editor, Propagation, dict[str, Any]]] = {
    "pnp": (PnP(), NNField(), {}),
    "pnp, full": (PnP(), NNField(), {"keyframe_attention": "full"}),
    "pnp, spans": (PnP(), NNField(), {"keyframe_every": 2, "span": 2, "anchors": 1}),
    "sdedit, previous": (SDEdit(0.6), NNField(), {"neighbours": "previous"}),
    "mixing": (Mixing(), NNField(), {}),
    "keys": (Keys(), NNField(), {}),
    "joint": (PnP(), NNField(), {"consistency": "joint"}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_second_edit_runs_without_the_source(backbone: Backbone, clip: Clip, case: str) -> None:
    editor, kernel, options = CASES[case]
    trajectory, schedule = inverted(backbone, clip), backbone.schedule(STEPS)
    settings = Settings(**{"steps": STEPS, "keyframe_every": 4, "batch": 3, **options})

    def edited(prompt: str, cache: SourceCache | None, batch: int = 3) -> tuple[Tensor, list[int]]:
        chosen = Settings(**{**vars(settings), "batch": batch})
        with counted(backbone) as rows:
            found = edit_latents(
                backbone, trajectory, schedule, prompt, editor, kernel, chosen, source_cache=cache
            )
        return found, rows

    cache = SourceCache()
    expected, rows = edited(PROMPTS[1], None)
    first, same = edited(PROMPTS[0], cache)
    assert not torch.allclose(first, expected, rtol=0, atol=1e-2)
    assert same == rows
    second, fewer = edited(PROMPTS[1], cache)
    assert fewer == [2 * count // 3 for count in rows]
    # float32 sums in batches of another size, through some steps
    assert torch.allclose(second, expected, rtol=0, atol=1e-4)
    other, _ = edited(PROMPTS[1], cache, batch=4)
    assert torch.allclose(other, expected, rtol=0, atol=1e-4)


def test_features_that_another_editor_lacks_are_added(backbone: Backbone, clip: Clip) -> None:
    trajectory, schedule, cache = inverted(backbone, clip), backbone.schedule(STEPS), SourceCache()
    settings, passes = Settings(steps=STEPS, keyframe_every=4, batch=9), []
    for editor in (SDEdit(), PnP(0.25, 0.5), PnP(0.25, 0.25), PnP(0.5, 0.5), PnP(0.5, 0.5)):
        with counted(backbone) as rows:
            edit_latents(
                backbone, trajectory, schedule, "x", editor, NNField(), settings,
                source_cache=cache,
            )  # fmt: skip
        passes.append([count == 12 for count in rows if count > 9])
    sdedit, first, fewer, more, again = passes
    assert sdedit == [False] * STEPS  # SDEdit's own begins one later, at this strength all run
    assert first == [False, False, True, True]
    assert fewer == [True, True, True, True]
    assert more == [True, False, True, True]
    assert again == [True] * STEPS


class QueriesAndValues(Editor):
    """As PnP, and later a function of the values, for which all branches' tokens must come by."""

    interface = 2

    def __init__(self, values: bool) -> None:
        self.values = values

    def injections(self, model: Backbone) -> Sequence[Injection]:
        queries = [Injection(layer, end=0.5) for layer in model.layers("queries")]
        if not self.values:
            return queries
        return queries + [
            Injection(layer, lambda edited, source, batch: edited, begin=0.5)
            for layer in model.layers("values")
        ]


@pytest.mark.parametrize("order", [(False, True), (True, False)])
def test_editors_that_need_other_features_keep_entries_of_their_own(
    backbone: Backbone, clip: Clip, order: tuple[bool, bool]
) -> None:
    trajectory, schedule, cache = inverted(backbone, clip), backbone.schedule(STEPS), SourceCache()
    settings = Settings(steps=STEPS, keyframe_every=4)
    for values in order:
        with_cache, without = (
            edit_latents(
                backbone, trajectory, schedule, "x", QueriesAndValues(values), NNField(), settings,
                source_cache=chosen,
            )
            for chosen in (cache, None)
        )  # fmt: skip
        assert torch.allclose(with_cache, without, rtol=0, atol=1e-4)


DIFFERENT: dict[str, dict[str, Any]] = {
    "seed": {"seed": 1},
    "window": {"keyframe_every": 5},
    "blend": {"blend": "linear"},
    "neighbours": {"neighbours": "previous"},
}


@pytest.mark.parametrize("what", [*DIFFERENT, "kernel", "name", "inversion prompt", "clip"])
def test_another_source_is_another_entry(backbone: Backbone, clip: Clip, what: str) -> None:
    schedule, cache, kernel = backbone.schedule(STEPS), SourceCache(), NNField()
    trajectory, name = inverted(backbone, clip), "clip"
    plain = Settings(steps=STEPS, keyframe_every=4)
    edit_latents(
        backbone, trajectory, schedule, "x", SDEdit(), kernel, plain, source_cache=cache
    )  # fmt: skip
    entries = len(cache.entries)
    settings = Settings(**{**vars(plain), **DIFFERENT.get(what, {})})
    prompt: Any = "x"
    if what == "kernel":
        kernel = NNField(block=7)
    elif what == "name":
        name = "another"
    elif what == "clip":
        trajectory.clean[0, 0, 0, 0] += 1
    elif what == "inversion prompt":
        prompt = Prompts("x", "", "a cube")
    with counted(backbone) as rows:
        edit_latents(
            backbone, trajectory, schedule, prompt, SDEdit(), kernel, settings, name=name,
            source_cache=cache,
        )  # fmt: skip
    assert all(count % 3 == 0 for count in rows)
    assert len(cache.entries) == 2 * entries


class Reading(PnP):
    """Reads the source's output after a step."""

    def advance(self, x: Tensor, outputs: Any, step: Any, source: Any) -> Tensor:
        return super().advance(x, outputs, step, source) + 0 * outputs["source"]


@pytest.mark.parametrize("editor", [Reading(), PromptToPrompt("a red ball")])
def test_an_editor_that_reads_the_source_has_it(
    backbone: Backbone, clip: Clip, editor: Editor
) -> None:
    cache, settings, passes = SourceCache(), Settings(steps=2, keyframe_every=4), []
    trajectory, schedule = inverted(backbone, clip, 2), backbone.schedule(2)
    for _ in range(2):
        with counted(backbone) as rows:
            edit_latents(
                backbone, trajectory, schedule, "a blue ball", editor, NNField(), settings,
                source_cache=cache,
            )  # fmt: skip
        passes.append(rows)
    assert passes[0] == passes[1]
    assert not cache.entries


def stored(folder: Path, editor: str = "editor", **options: Any) -> ResumeStore:
    return ResumeStore(Cache(folder), editor, "kernel", **options)


def test_entries_lie_beside_the_inversion(backbone: Backbone, clip: Clip, tmp_path: Path) -> None:
    settings = Settings(steps=STEPS, keyframe_every=4)

    def edited(prompt: str, **options: Any) -> tuple[Tensor, list[int]]:
        with counted(backbone) as rows:
            store = stored(tmp_path, **options)
            result = edit_clip(backbone, clip, prompt, PnP(), NNField(), settings, store=store)
        assert result.checkpoint is not None
        result.checkpoint.remove()
        return result.latents, rows

    first, rows = edited(PROMPTS[0])
    kinds = [entry.kind for entry in Cache(tmp_path).entries()]
    assert kinds.count("features") == STEPS
    again, same = edited(PROMPTS[0])
    # an edit does not use what it has left itself: it takes the same passes, bit for bit
    assert torch.equal(again, first)
    assert same == rows[-len(same) :]
    without, _ = edited(PROMPTS[1], source=False)
    second, fewer = edited(PROMPTS[1])
    assert fewer == [2 * count // 3 for count in same]
    assert torch.allclose(second, without, rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.* is damaged")
def test_a_damaged_entry_is_computed_anew(backbone: Backbone, clip: Clip, tmp_path: Path) -> None:
    settings = Settings(steps=STEPS, keyframe_every=4, batch=9)
    passes = []
    for number, prompt in enumerate("abc"):
        with counted(backbone) as rows:
            edit_clip(backbone, clip, prompt, PnP(), NNField(), settings, store=stored(tmp_path))
        passes.append([count == 12 for count in rows if count > 9])
        if number == 0:
            entry = next(e for e in Cache(tmp_path).entries() if e.kind == "features")
            entry.path.write_bytes(entry.path.read_bytes()[:-7])
    assert sum(passes[1]) == STEPS - 1
    assert sum(passes[2]) == STEPS


def test_an_edit_that_is_resumed_takes_nothing_that_was_kept_since(
    backbone: Backbone, clip: Clip, tmp_path: Path
) -> None:
    settings = Settings(steps=STEPS, keyframe_every=4)

    def edited(folder: str, prompt: str, stop: int | None = None) -> Tensor:
        return edit_clip(
            backbone, clip, prompt, PnP(), NNField(), settings, store=stored(tmp_path / folder),
            on_step=lambda stage, done, _: "stop" if (stage, done) == ("edit", stop) else None,
        ).latents  # fmt: skip

    whole = edited("alone", "a red ball")
    with pytest.raises(Preempted):
        edited("shared", "a red ball", stop=2)
    edited("shared", "a blue cube")
    with pytest.raises(Preempted):
        edited("shared", "a red ball", stop=3)
    assert torch.equal(edited("shared", "a red ball"), whole)


def test_an_edit_that_took_from_the_cache_takes_the_rest_when_resumed(
    backbone: Backbone, clip: Clip, tmp_path: Path
) -> None:
    settings, passes = Settings(steps=STEPS, keyframe_every=4, batch=9), []
    for folder, stops in (("whole", ()), ("stopped", (1, 3))):
        for prompt in ("a blue cube", "a red ball"):
            with counted(backbone) as rows:
                for stop in (*(stops if prompt == "a red ball" else ()), None):
                    with suppress(Preempted):
                        edit_clip(
                            backbone, clip, prompt, PnP(), NNField(), settings,
                            store=stored(tmp_path / folder),
                            on_step=lambda stage, done, _, stop=stop: (
                                "stop" if (stage, done) == ("edit", stop) else None
                            ),
                        )  # fmt: skip
        passes.append([count for count in rows if count > 9])
    assert passes[0] == passes[1]


def test_one_clip_takes_half_of_the_limit(backbone: Backbone, clip: Clip, tmp_path: Path) -> None:
    settings = Settings(steps=STEPS, keyframe_every=4)
    store = ResumeStore(Cache(tmp_path, gigabytes=2.5e-4), "editor", "kernel")
    with pytest.warns(UserWarning, match="more than half of its 0.00025 GB"):
        edit_clip(backbone, clip, "x", PnP(), NNField(), settings, store=store)
    kept = [e.size for e in Cache(tmp_path).entries() if e.kind == "features"]
    assert 0 < len(kept) < STEPS
    assert sum(kept) < 1.25e5 + 1e4 * len(kept)  # with names and checksums


def test_beyond_its_budget_memory_is_mapped(backbone: Backbone, clip: Clip) -> None:
    trajectory, schedule = inverted(backbone, clip), backbone.schedule(STEPS)
    settings, results = Settings(steps=STEPS, keyframe_every=4), []
    for budget in (0, 1 << 30):
        cache = SourceCache(budget=budget)
        for prompt in PROMPTS:
            found = edit_latents(
                backbone, trajectory, schedule, prompt, PnP(), NNField(), settings,
                source_cache=cache,
            )  # fmt: skip
        results.append(found)
    assert torch.equal(*results)


def test_a_full_disk_ends_the_cache_and_not_the_edit(
    backbone: Backbone, clip: Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    trajectory, schedule = inverted(backbone, clip), backbone.schedule(STEPS)
    settings, cache = Settings(steps=STEPS, keyframe_every=4), SourceCache(budget=0)

    def edited(cache: SourceCache | None) -> Tensor:
        return edit_latents(
            backbone, trajectory, schedule, "x", PnP(), NNField(), settings, source_cache=cache
        )

    def refused(self: Spill, tensor: Tensor) -> Tensor:
        raise InputError("no space left")

    without = edited(None)
    monkeypatch.setattr(Spill, "keep", refused)
    with pytest.warns(UserWarning, match="clip are not all cached.*: no space left") as warned:
        assert torch.equal(edited(cache), without)
    assert len(warned) == 1
    assert torch.equal(edited(cache), without)


def test_a_step_that_is_too_large_for_memory_is_not_kept(
    backbone: Backbone, clip: Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokenflow.engine.source_cache.BUDGET", 50_000)
    cache, settings = SourceCache(), Settings(steps=STEPS, keyframe_every=4)
    with pytest.warns(UserWarning, match="the source features of clip take more than"):
        edit_latents(
            backbone, inverted(backbone, clip), backbone.schedule(STEPS), "x", PnP(), NNField(),
            settings, source_cache=cache,
        )  # fmt: skip
    assert not cache.entries


def test_a_kernel_is_described_by_its_options() -> None:
    class Forgetful(NNField):
        def __init__(self, option: int) -> None:
            super().__init__()

    kernels = [
        NNField(), NNField(4), FlowWeighted(), FlowWeighted(inconsistency=2.0),
        FlowWeighted(FlowFiles("flow")), FlowWeighted(FlowFiles("other")),
    ]  # fmt: skip
    texts = [str(described(kernel)) for kernel in kernels]
    assert len(set(texts)) == len(texts)
    assert texts == [str(described(kernel)) for kernel in kernels]
    assert "None" not in texts
    assert described(Forgetful(1)) is None
    learned = NNField()
    learned.block = torch.ones(1)  # type: ignore[assignment]
    assert described(learned) is None
