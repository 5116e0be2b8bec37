"""Cached inversions and sampling checkpoints: their keys, and runs that are resumed from them."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.diffusion.making import make_controlnet
from tests.on_ranks import on_ranks
from tokenflow.diffusion import Backbone
from tokenflow.editors import ControlNet, ControlVideo, Editor, PnP, Prompts, SDEdit
from tokenflow.engine import Result, Settings, edit_clip
from tokenflow.engine.keyframes import split_windows
from tokenflow.engine.ranks.group import FrameGroup
from tokenflow.engine.resume import ResumeStore
from tokenflow.errors import Preempted
from tokenflow.propagation import NNField
from tokenflow.storage.cache import Cache
from tokenflow.testing import tiny_clip
from tokenflow.video import Clip, write_image

SETTINGS = Settings(steps=4, keyframe_every=3, batch=4)
CLIP = tiny_clip(7)


class Counting:
    """Counts the stages' steps, and stops at one of them."""

    def __init__(self, stop: tuple[str, int] | None = None) -> None:
        self.steps: dict[str, int] = {}
        self.stop = stop

    def __call__(self, stage: str, step: int, steps: int) -> Literal["stop"] | None:
        self.steps[stage] = self.steps.get(stage, 0) + 1
        return "stop" if (stage, step) == self.stop else None


def edit(
    backbone: Backbone,
    cache: Cache | None,
    prompt: str = "a ball",
    clip: Clip = CLIP,
    settings: Settings = SETTINGS,
    counting: Counting | None = None,
    editor: Editor | None = None,
    described: str | None = None,
    kernel: str = "NNField()",
    ranks: FrameGroup | None = None,
    **prompts: str,
) -> Result:
    editor = editor or PnP()
    described = described or f"{type(editor).__name__}({vars(editor)})"
    store = cache and ResumeStore(cache, described, kernel, 2)
    return edit_clip(
        backbone, clip, Prompts(prompt, **prompts), editor, NNField(), settings,
        on_step=counting or Counting(), store=store, ranks=ranks,
    )  # fmt: skip


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path)


def kinds(cache: Cache) -> list[str]:
    return sorted(entry.kind for entry in cache.entries())


def test_another_prompt_does_not_invert_again(backbone: Backbone, cache: Cache) -> None:
    first, second = Counting(), Counting()
    edit(backbone, cache, counting=first)
    assert first.steps == {"encode": 2, "invert": 8, "edit": 4, "decode": 2}
    found = edit(backbone, cache, "a box", counting=second)
    assert second.steps == {"cached": 1, "edit": 4, "decode": 2}
    assert torch.equal(found.clip.frames, edit(backbone, None, "a box").clip.frames)
    assert kinds(cache).count("inversion") == 7


def test_frames_are_found_in_another_cut_of_the_clip(backbone: Backbone, cache: Cache) -> None:
    edit(backbone, cache)
    counting, longer = Counting(), tiny_clip(9)
    assert torch.equal(longer.frames[:7], CLIP.frames)
    edit(backbone, cache, clip=longer, counting=counting)
    # batches of four: the second has one new frame, the third is new
    assert counting.steps["encode"] == 2


CHANGES: dict[str, Callable[[Backbone], dict[str, Any]]] = {
    "frames": lambda _: {"clip": Clip.from_frames((CLIP.frames + 0.001).clamp(0, 1))},
    "the source's prompt": lambda _: {"inversion_prompt": "a dog"},
    "steps": lambda _: {"settings": dataclasses.replace(SETTINGS, steps=3)},
    "inversion's solver": lambda _: {
        "settings": dataclasses.replace(SETTINGS, inversion_solver="uni-inv")
    },
    "inversion steps": lambda _: {"settings": dataclasses.replace(SETTINGS, inversion_steps=6)},
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_inversion_depends_on_is_part_of_the_key(
    backbone: Backbone, cache: Cache, change: str
) -> None:
    edit(backbone, cache)
    counting = Counting()
    edit(backbone, cache, counting=counting, **CHANGES[change](backbone))
    assert "cached" not in counting.steps


def configured(part: str, **values: Any) -> Callable[[Path], None]:
    """Changes a model folder's configuration."""

    def change(folder: Path) -> None:
        file = next((folder / part).glob("*config.json"))
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return change


def one_weight(folder: Path) -> None:
    """Changes one of thousands, in the middle of a matrix."""
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    largest = max(weights.values(), key=Tensor.numel).view(-1)
    largest[largest.numel() // 2 + 1] += 1
    save_file(weights, file, {"format": "pt"})


def swapped_tokens(folder: Path) -> None:
    """A vocabulary of the same size, with two words' numbers exchanged."""
    file = folder / "tokenizer" / "tokenizer.json"
    known = json.loads(file.read_text())
    words = known["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    file.write_text(json.dumps(known))


MODELS: dict[str, Callable[[Path], None]] = {
    "one weight": one_weight,
    "the UNet's heads": configured("unet", attention_head_dim=[2, 2, 4, 4]),
    "the VAE's scale": configured("vae", scaling_factor=0.5),
    "the VAE's norm": configured("vae", norm_num_groups=2),
    "the text encoder's activation": configured("text_encoder", hidden_act="gelu"),
    "the schedule": configured("scheduler", beta_end=0.02),
    "the vocabulary": swapped_tokens,
}


@pytest.mark.parametrize("change", MODELS)
def test_a_changed_model_has_another_fingerprint(
    backbone: Backbone, model_folder: Path, tmp_path: Path, change: str
) -> None:
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    assert Backbone.load(folder, "cpu", "float32").fingerprint == backbone.fingerprint
    MODELS[change](folder)
    assert Backbone.load(folder, "cpu", "float32").fingerprint != backbone.fingerprint


def test_a_used_model_has_the_same_fingerprint(model_folder: Path) -> None:
    asked, fresh = (
        Backbone.load(model_folder, "cpu", "float32"),
        Backbone.load(model_folder, "cpu", "float32"),
    )
    asked.embed(["a ball"])
    # diffusers notes in no fixed order what a file left out
    asked.scheduler.register_to_config(_use_default_values=["beta_start", "clip_sample"])
    assert asked.fingerprint == fresh.fingerprint


@pytest.mark.parametrize("what", ["cache_key", "load", "encode"])
def test_a_signal_ends_at_once_what_comes_before_sampling(
    backbone: Backbone, cache: Cache, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    if what != "encode":
        edit(backbone, cache)
    ranks, calls = FrameGroup(), 0
    owner = {"cache_key": PnP, "load": Cache, "encode": type(backbone)}[what]
    before = getattr(owner, what)

    def signalled(self: Any, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        signal.raise_signal(signal.SIGTERM)
        return before(self, *args)

    monkeypatch.setattr(owner, what, signalled)
    ranks.preemption.install()
    try:
        with pytest.raises(Preempted):
            edit(backbone, cache, ranks=ranks)
    finally:
        ranks.preemption.restore()
    assert calls == 1


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_file_is_computed_again(backbone: Backbone, cache: Cache, damage: str) -> None:
    expected = edit(backbone, cache).clip.frames
    path = next(entry.path for entry in cache.entries() if entry.kind == "inversion")
    path.unlink() if damage == "gone" else path.write_bytes(path.read_bytes()[:-3])
    counting = Counting()
    if damage == "cut":
        with pytest.warns(UserWarning, match="damaged"):
            found = edit(backbone, cache, settings=SETTINGS, kernel="other", counting=counting)
    else:
        found = edit(backbone, cache, settings=SETTINGS, kernel="other", counting=counting)
    assert counting.steps["invert"] == 4  # one batch
    assert torch.equal(found.clip.frames, expected)


def test_an_editor_with_an_influence_on_inversion_is_part_of_its_key(
    backbone: Backbone, cache: Cache, tmp_path: Path
) -> None:
    model = str(make_controlnet(tmp_path / "control", backbone.unet))
    edit(backbone, cache, editor=PnP())
    for options in ({"control_source": True}, {"control_source": True, "scale": 0.5}):
        for expected in (0, 1):
            counting = Counting()
            edit(backbone, cache, editor=ControlNet(model, **options), counting=counting)
            assert counting.steps.get("cached", 0) == expected
    for editor in (SDEdit(0.5), ControlNet(model), ControlNet(model, scale=0.5)):  # they have none
        counting = Counting()
        edit(backbone, cache, editor=editor, counting=counting)
        assert counting.steps["cached"] == 1


def show(folder: Path, images: Tensor) -> None:
    """Writes control images over what is there."""
    folder.mkdir(exist_ok=True)
    for number, image in enumerate(images):
        write_image(folder / f"{number}.png", image)


def control(folder: Path, **options: Any) -> dict[str, Any]:
    """An editor with the files in a folder, under one description whatever they hold."""
    images = ControlVideo(str(folder / "images"))
    editor = ControlNet(str(folder / "model"), images, **options)
    return {"editor": editor, "described": "ControlNet"}


@pytest.fixture
def controls(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("control")
    make_controlnet(folder / "model", backbone.unet)
    show(folder / "images", CLIP.frames.flip(0))
    return folder


def other_image(folder: Path, backbone: Backbone) -> None:
    show(folder / "images", torch.zeros(1, 3, 16, 32))


def other_weights(folder: Path, backbone: Backbone) -> None:
    make_controlnet(folder / "model", backbone.unet, seed=1)


@pytest.mark.parametrize(("change", "batches"), [(other_image, 1), (other_weights, 2)])
def test_an_inversion_under_another_control_is_not_found(
    backbone: Backbone, cache: Cache, controls: Path, change: Callable[..., None], batches: int
) -> None:
    edit(backbone, cache, **control(controls, control_source=True))
    change(controls, backbone)
    for expected in (batches, 0):
        counting = Counting()
        edit(backbone, cache, counting=counting, **control(controls, control_source=True))
        assert counting.steps.get("encode", 0) == expected


def test_equal_frames_under_different_controls_are_kept_apart(
    backbone: Backbone, cache: Cache, controls: Path
) -> None:
    still = Clip.from_frames(CLIP.frames[:1].expand(7, -1, -1, -1))
    edit(backbone, cache, clip=still, **control(controls))
    assert kinds(cache).count("inversion") == 1
    edit(backbone, cache, clip=still, **control(controls, control_source=True))
    assert kinds(cache).count("inversion") == 1 + 7


@pytest.mark.parametrize("change", [other_image, other_weights, None])
def test_a_sampling_under_another_control_is_not_resumed(
    backbone: Backbone, cache: Cache, controls: Path, change: Callable[..., None] | None
) -> None:
    with pytest.raises(Preempted):
        edit(backbone, cache, counting=Counting(("edit", 3)), **control(controls))
    if change is not None:
        change(controls, backbone)
    counting = Counting()
    edit(backbone, cache, counting=counting, **control(controls))
    assert counting.steps["edit"] == (1 if change is None else 4)
    assert counting.steps["cached"] == 1  # inversion has seen nothing of it


STOPS = [("encode", 2), ("invert", 5), ("edit", 1), ("edit", 2), ("edit", 3), ("decode", 2)]
# SDEdit begins with the second of four steps
INTERRUPTED = [(PnP(), stop) for stop in STOPS] + [(SDEdit(0.75), stop) for stop in STOPS[3:]]


@pytest.mark.parametrize(("editor", "stop"), INTERRUPTED)
def test_an_interrupted_run_is_resumed_bit_for_bit(
    backbone: Backbone, cache: Cache, editor: Editor, stop: tuple[str, int]
) -> None:
    expected = edit(backbone, None, editor=editor).clip.frames
    with pytest.raises(Preempted) as stopped:
        edit(backbone, cache, counting=Counting(stop), editor=editor)
    assert stopped.value.code == 75
    counting = Counting()
    result = edit(backbone, cache, counting=counting, editor=editor)
    assert torch.equal(result.clip.frames, expected)
    stage, step = stop
    if stage == "edit":
        assert counting.steps.get("edit", 0) == 4 - step
    if stage == "decode":
        assert "edit" not in counting.steps
    if stage == "invert":
        assert counting.steps["cached"] == 1  # one batch was through
    assert result.checkpoint is not None
    result.checkpoint.remove()
    assert "sampling" not in kinds(cache)


def test_checkpoints_are_written_every_few_steps(backbone: Backbone, cache: Cache) -> None:
    """What a killed process leaves: here an exception that nothing foresees."""

    class Killed(BaseException):
        pass

    class Killing(Counting):
        def __call__(self, stage: str, step: int, steps: int) -> None:
            super().__call__(stage, step, steps)
            if (stage, step) == ("edit", 4):
                raise Killed

    with pytest.raises(Killed):
        edit(backbone, cache, counting=Killing())
    counting = Counting()
    result = edit(backbone, cache, counting=counting)
    assert counting.steps["edit"] == 2  # kept after every second step
    assert torch.equal(result.clip.frames, edit(backbone, None).clip.frames)


SAMPLING_CHANGES: dict[str, dict[str, Any]] = {
    "prompt": {"prompt": "a box"},
    "negative prompt": {"negative_prompt": "a dog"},
    "seed": {"settings": dataclasses.replace(SETTINGS, seed=1)},
    "guidance": {"settings": dataclasses.replace(SETTINGS, guidance=2.0)},
    "guidance's part": {"settings": dataclasses.replace(SETTINGS, guidance_end=0.5)},
    "fusion's part": {"settings": dataclasses.replace(SETTINGS, fusion_end=0.5)},
    "editor": {"editor": PnP(attention=0.2)},
    "kernel": {"kernel": "other"},
    "name, by which keyframes are drawn": {"clip": dataclasses.replace(CLIP, name="other")},
}


@pytest.mark.parametrize("change", SAMPLING_CHANGES)
def test_another_edit_is_not_resumed_from_it(backbone: Backbone, cache: Cache, change: str) -> None:
    with pytest.raises(Preempted):
        edit(backbone, cache, counting=Counting(("edit", 3)))
    counting = Counting()
    edit(backbone, cache, counting=counting, **SAMPLING_CHANGES[change])
    assert counting.steps["edit"] == 4


def test_a_run_with_a_lower_batch_is_resumed(backbone: Backbone, cache: Cache) -> None:
    with pytest.raises(Preempted):
        edit(backbone, cache, counting=Counting(("edit", 3)))
    counting = Counting()
    edit(backbone, cache, settings=dataclasses.replace(SETTINGS, batch=1), counting=counting)
    assert counting.steps["edit"] == 1


@pytest.mark.parametrize("left", ["nothing", "a file"])
def test_a_cache_that_vanishes_costs_no_result(backbone: Backbone, cache: Cache, left: str) -> None:
    class Vanishing(Counting):
        def __call__(self, stage: str, step: int, steps: int) -> None:
            super().__call__(stage, step, steps)
            if (stage, step) in [("invert", 5), ("edit", 1)]:
                shutil.rmtree(cache.folder, ignore_errors=True)
                if left == "a file":
                    cache.folder.touch()

    told = pytest.warns(match="cannot be written") if left == "a file" else nullcontext()
    with told:
        result = edit(backbone, cache, counting=Vanishing())
    assert torch.equal(result.clip.frames, edit(backbone, None).clip.frames)
    left_behind = {"sampling", "features"} if left == "nothing" else set[str]()
    assert set(kinds(cache)) == left_behind


def test_without_a_description_only_inversions_are_cached(backbone: Backbone, cache: Cache) -> None:
    edit_clip(backbone, CLIP, "a ball", PnP(), NNField(), SETTINGS, store=ResumeStore(cache))
    assert set(kinds(cache)) == {"inversion"}


def on_this_rank(
    model: Path, folder: Path, stop: tuple[str, int] | None = None, who: int = 0
) -> tuple[Tensor | None, dict[str, int]]:
    """A rank's frames, if it is not stopped, and the steps that it took."""
    backbone, ranks = Backbone.load(model, "cpu", "float32"), FrameGroup.join()
    counting = Counting(stop if ranks.rank == who else None)
    store = ResumeStore(Cache(folder), "PnP()", "NNField()", 2)
    shard = ranks.shard(split_windows(len(CLIP), SETTINGS.keyframe_every))
    try:
        result = edit_clip(
            backbone, CLIP.part(shard.positions(shard.halo)), "a ball", PnP(), NNField(), SETTINGS,
            on_step=counting, ranks=ranks, store=store,
        )  # fmt: skip
    except Preempted:
        return None, counting.steps
    return result.clip.frames[: shard.frame_counts[ranks.rank]], counting.steps


def whole(parts: list[tuple[Tensor, dict[str, int]]]) -> Tensor:
    """All frames."""
    return torch.cat([frames for frames, _ in parts])


@pytest.fixture(scope="module")
def both(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    """What two ranks make of the clip."""
    folder = tmp_path_factory.mktemp("both")
    return whole(on_ranks(2, folder, on_this_rank, model_folder, folder / "cache"))


@pytest.mark.parametrize(
    ("stop", "who"), [(("invert", 2), 1), (("edit", 3), 0), (("edit", 3), 1), (("decode", 1), 0)]
)
def test_ranks_stop_at_the_same_step_and_others_are_resumed(
    model_folder: Path, tmp_path: Path, both: Tensor, stop: tuple[str, int], who: int
) -> None:
    cache = tmp_path / "cache"
    stopped = on_ranks(2, tmp_path / "a", on_this_rank, model_folder, cache, stop, who)
    assert all(frames is None for frames, _ in stopped)
    edits = {"invert": 4, "edit": 1, "decode": 0}[stop[0]]
    assert all(steps.get("edit", 0) == 4 - edits for _, steps in stopped)
    # another number of ranks: sums over keyframes in another order
    for size in (2, 3) if (stop, who) == (("edit", 3), 0) else (2,):
        kept = Path(shutil.copytree(cache, tmp_path / f"cache{size}"))
        again = on_ranks(size, tmp_path / f"{size}", on_this_rank, model_folder, kept)
        assert all(steps.get("edit", 0) == edits for _, steps in again)
        assert (
            torch.equal(whole(again), both)
            if size == 2
            else torch.allclose(whole(again), both, 0, 1e-4)
        )


UNFIT: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "names": lambda known: {"x": next(iter(known.values()))},
    "shapes": lambda known: {name: value[None] for name, value in known.items()},
    "types": lambda known: {name: value.double() for name, value in known.items()},
    "values": lambda known: known | {"latents": known["latents"] / 0},
    "a step past the last": lambda known: known | {"done": torch.tensor(5)},
    "a step before the first": lambda known: known | {"done": torch.tensor(-1)},
}


@pytest.mark.parametrize("change", UNFIT)
@pytest.mark.parametrize("kind", ["inversion", "sampling"])
def test_a_whole_file_that_does_not_fit_is_computed_again(
    backbone: Backbone, cache: Cache, kind: str, change: str
) -> None:
    """As another version, or another program, may have left it under a key."""
    expected = edit(backbone, None).clip.frames
    with pytest.raises(Preempted):
        edit(backbone, cache, counting=Counting(("edit", 3)))
    path = next(entry.path for entry in cache.entries() if entry.kind == kind)
    kept = cache.load(path.stem)
    assert kept is not None
    cache.save(path.stem, UNFIT[change](kept), kind, "clip")
    with pytest.warns(UserWarning, match="what it should hold is computed anew"):
        result = edit(backbone, cache)
    assert torch.equal(result.clip.frames, expected)
    assert cache.load(path.stem) is not None or kind == "sampling"


def test_another_clips_file_under_a_key_is_not_used(backbone: Backbone, cache: Cache) -> None:
    edit(backbone, cache)
    mine = next(entry.path for entry in cache.entries() if entry.kind == "inversion")
    kept = set(cache.entries())
    edit(backbone, cache, clip=Clip.from_frames(1 - CLIP.frames))
    other = next(e.path for e in cache.entries() if e.kind == "inversion" and e not in kept)
    shutil.copy(other, mine)
    expected = edit(backbone, None).clip.frames
    with pytest.warns(UserWarning, match="what it should hold is computed anew"):
        assert torch.equal(edit(backbone, cache).clip.frames, expected)
