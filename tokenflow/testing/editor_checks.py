"""The checks of an editor: it changes what it says, for as long as it is on, and nothing else.

What several ranks rely on is checked by its causes, too, which say more of what is wrong: a frame's
part of a pass does not depend on which other frames are in the pass or were shown in `prepare`, and
nothing on torch's global random state.
"""

from __future__ import annotations

import copy
import dataclasses
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tokenflow.diffusion import Backbone
from tokenflow.editors import Batch, Editor, Injection, Start, editor_contract
from tokenflow.engine import Settings, SourceCache
from tokenflow.engine.edit import sees_all
from tokenflow.engine.network import EditedNetwork
from tokenflow.engine.ranks.group import FrameGroup
from tokenflow.errors import PluginError
from tokenflow.testing.checks import (
    Check,
    anew,
    configuration_round_trip,
    interface_stated,
    require,
    require_kept,
    run_all,
    unchanged_state,
)
from tokenflow.testing.state import backbone_state
from tokenflow.testing.threads import on_ranks
from tokenflow.testing.tiny_edit import FRAMES, PARTS, PROMPTS, STEPS, TinyEdit

ROUNDING = 1e-4
"""float32 through a network, with sums in another order."""
GUIDED = 10
"""How much guidance, at its scale of 7.5, and two steps make of it."""


def check_editor(editor: Editor, backbone: Backbone | None = None) -> None:
    """Runs all checks of an editor; raises `ConformanceError` at the first that fails."""
    run_all(editor_checks(editor, backbone))


def editor_checks(editor: Editor, backbone: Backbone | None = None) -> list[Check]:
    """All checks of an editor, to be called one by one.

    They run on a tiny random model, or on the `backbone` that the editor needs to fit.
    """
    functions = (
        branches_with_prompts, start_shape, step_of_the_schedule, start_per_frame,
        answers_keep_shape_and_dtype, result_shape, backbone_restored, source_branch_unchanged,
        source_condition_stated, injections_have_an_effect, cache_key_of_frames,
        frames_independent_of_the_pass, batch_independent, advance_per_frame, two_ranks_agree,
        same_without_the_source,
        determinism_from_the_seed, clips_independent, inputs_unchanged, global_state_unchanged,
    )  # fmt: skip
    watched = [Check(editor, function, (backbone,)) for function in functions]
    return [*watched, *(Check(editor, one) for one in (configuration_round_trip, interface_stated))]


def branches_with_prompts(editor: Editor, backbone: Backbone | None) -> None:
    require_kept(editor_contract.of_branches(editor.branches(PROMPTS)), "branches")


def started(tiny: TinyEdit, *rules: str) -> Start:
    """What `start` returns, which keeps these rules of its contract."""
    source = tiny.trajectory.source()
    begin = tiny.editor.start(source, tiny.schedule, 0)
    require_kept(editor_contract.of_start(begin, source, tiny.schedule), "form", *rules)
    return begin


def start_shape(editor: Editor, backbone: Backbone | None) -> None:
    started(TinyEdit.of(editor, backbone), "finite")


def step_of_the_schedule(editor: Editor, backbone: Backbone | None) -> None:
    started(TinyEdit.of(editor, backbone), "step")


def start_per_frame(editor: Editor, backbone: Backbone | None) -> None:
    tiny = TinyEdit.of(editor, backbone)
    begin = started(tiny)
    for part in PARTS:
        whole = begin.latents[part.start : part.stop]
        source = tiny.part(part).trajectory.source()
        other = editor.start(source, tiny.schedule, 0)
        require(
            other.step == begin.step,
            "the same first step, whichever frames a rank has",
            f"{other.step} where it has frames {list(part)} alone, else {begin.step}",
            "choose it by the schedule and the options alone",
        )  # fmt: skip
        alone = other.latents
        require(
            alone.shape == whole.shape and torch.allclose(alone, whole, atol=ROUNDING),
            "the same first latents of a frame, whichever others a rank has",
            f"others where it has frames {list(part)} alone",
            "treat every frame on its own, and draw noise by source.frames, which has the frames' "
            "positions in the clip",
        )  # fmt: skip


def answers_keep_shape_and_dtype(editor: Editor, backbone: Backbone | None) -> None:
    for dtype in (None, torch.bfloat16):
        tiny = TinyEdit.of(editor, backbone, dtype=dtype)
        require_kept(
            editor_contract.of_injections(list(editor.injections(tiny.model)), tiny.model),
            "injections",
        )
        require_kept(
            editor_contract.of_cross_attention(editor.cross_attention(tiny.model), tiny.model),
            "cross_attention",
        )
        for index in range(STEPS):
            step, source = tiny.step(index), tiny.trajectory.source()
            inputs = editor.inputs(tiny.x, step, source)
            require_kept(editor_contract.of_inputs(inputs, tiny.x, len(step.branches)), "answer")
            kept = editor.kept(step, source)
            require_kept(editor_contract.of_kept(kept, source.clean), "answer")
            batch = tiny.batch(range(FRAMES), index)
            conditioning, extra = editor.conditioning(batch), editor.model_inputs(batch)
            require_kept(editor_contract.of_conditioning(conditioning, batch), "conditioning")
            require_kept(editor_contract.of_model_inputs(extra, tiny.model), "model_inputs")
            tiny.outputs(range(FRAMES), index)  # checks the injections' answers


def result_shape(editor: Editor, backbone: Backbone | None) -> None:
    tiny = TinyEdit.of(editor, backbone)
    result, clean = tiny.edit(), tiny.trajectory.clean
    require(
        result.shape == clean.shape and bool(result.isfinite().all()),
        f"finite edited latents of shape {tuple(clean.shape)}", tuple(result.shape),
        "look at what injections(), model_inputs() and advance() return",
    )  # fmt: skip


def backbone_restored(editor: Editor, backbone: Backbone | None) -> None:
    tiny = TinyEdit.of(editor, backbone, prepare=False)
    before, output = backbone_state(tiny.model), tiny.outputs(range(FRAMES), 0, edited=False)
    editor.prepare(tiny.model, tiny.clip)
    tiny.edit()
    after, again = backbone_state(tiny.model), tiny.outputs(range(FRAMES), 0, edited=False)
    changed = [name for name, value in after.items() if before[name] != value]
    require(
        not changed, "the model after an edit to be what it was", f"other {' and '.join(changed)}",
        "return changes of the network from injections() and cross_attention(), and leave "
        "installing them to the engine",
    )  # fmt: skip
    require(
        torch.equal(output, again),
        "the network's output after an edit to be what it was, bit for bit",
        f"a difference of {float((output - again).abs().max()):.4g}",
        "do not change the network's processors",
    )  # fmt: skip


def source_branch_unchanged(editor: Editor, backbone: Backbone | None) -> None:
    tiny = TinyEdit.of(editor, backbone)
    for index in range(STEPS):
        plain, edited = tiny.source_output(index), tiny.outputs(range(FRAMES), index)[0]
        difference = float((edited - plain).abs().max())
        require(
            difference <= ROUNDING, "the source branch's output as in a pass of the source alone",
            f"a difference of {difference:.4g} at step {index}",
            "do not write into the source that an injection is given, and condition its branch as "
            "in inversion: correspondences are found in it",
        )  # fmt: skip


def source_condition_stated(editor: Editor, backbone: Backbone | None) -> None:
    tiny = TinyEdit.of(editor, backbone)
    if editor.conditions_source:
        return
    for index in range(STEPS):
        plain = tiny.plain.run(tiny.source_batch(index))[0]
        difference = float((tiny.source_output(index) - plain).abs().max())
        require(
            difference <= ROUNDING,
            "no effect on inversion's pass where conditions_source is False",
            f"a difference of {difference:.4g} at step {index}",
            "change nothing where batch.inversion, or let conditions_source be True: else another "
            "editor's inversion would be taken from the cache",
        )  # fmt: skip


def injections_have_an_effect(editor: Editor, backbone: Backbone | None) -> None:
    """Each has its layer run, with the frames' own attention, at a step where it is on.

    Whether it also does so in propagated passes is not asked: projections of self-attention do not.
    """
    tiny = TinyEdit.of(editor, backbone)
    counted = Counted(list(editor.injections(tiny.model)))
    network = EditedNetwork(tiny.model, counted, PROMPTS)
    with network.installed():
        for index in range(STEPS):
            x = tiny.x[None, :1].expand(len(network.branches), -1, -1, -1, -1)
            step = dataclasses.replace(tiny.step(index), branches=network.branches)
            network.run(network.batch(x, (0,), step))
    for number, one in enumerate(counted.given):
        steps = [index for index in range(STEPS) if one.active(index, STEPS)]
        require(
            not steps or number in counted.called,
            "an injection into a layer that runs", f"{one.layer}, which no pass calls",
            "choose a layer of model.layers(role), or one that the network's forward calls",
        )  # fmt: skip


def cache_key_of_frames(editor: Editor, backbone: Backbone | None) -> None:
    def said(editor: Editor) -> list[Any]:
        tiny = TinyEdit.of(editor, backbone)
        whole = list(map(editor.cache_key, range(FRAMES)))
        return whole + [key for own in PARTS for key in map(tiny.part(own).editor.cache_key, own)]

    every, again = said(editor), said(copy.deepcopy(editor))
    wrong = [one for one in every if not isinstance(one, str)]
    require(not wrong, "cache_key() to return text", wrong, "return a digest, or '' for nothing")
    require(
        every == again == 2 * every[:FRAMES], "the same cache key of a frame at every time",
        f"{every} and {again}",
        "make it of what files hold for this frame alone: checkpoints are found by it",
    )  # fmt: skip


def frames_independent_of_the_pass(editor: Editor, backbone: Backbone | None) -> None:
    tiny = TinyEdit.of(editor, backbone)
    whole = [tiny.outputs(range(FRAMES), index) for index in range(STEPS)]

    def compare(tiny: TinyEdit, part: range, where: str) -> None:
        for index in range(STEPS):
            alone = tiny.outputs(part, index)
            difference = float((alone - whole[index][:, list(part)]).abs().max())
            require(
                difference <= ROUNDING, "a frame's output not to depend on the pass's other frames",
                f"a difference of {difference:.4g} for frames {list(part)} {where} at step {index}",
                "go by batch.frames, treat every frame on its own, and draw noise per frame: which "
                "frames share a pass depends on the batch and on the ranks",
            )  # fmt: skip

    for part in PARTS:
        compare(tiny, part, "alone in a pass")
    for part in PARTS:
        own = tiny.part(part)
        compare(dataclasses.replace(own, x=tiny.x[list(part)]), part, "alone on a rank")


def batch_independent(editor: Editor, backbone: Backbone | None) -> None:
    tiny = TinyEdit.of(editor, backbone)
    # without propagation, in which rounding may turn a match
    results = [tiny.edit(batch, consistency="none") for batch in (1, FRAMES)]
    difference = float((results[0] - results[1]).abs().max())
    require(
        difference <= GUIDED * ROUNDING, "the same edit whatever the batch",
        f"a difference of {difference:.4g}",
        "keep nothing from one call to the next: how many passes a step has is the engine's choice",
    )  # fmt: skip


def advance_per_frame(editor: Editor, backbone: Backbone | None) -> None:
    tiny = TinyEdit.of(editor, backbone)
    outputs = [tiny.outputs(range(FRAMES), index) for index in range(STEPS)]

    def advanced(tiny: TinyEdit, part: range, index: int) -> Tensor:
        step, source = tiny.step(index), tiny.trajectory.source(part)
        x, given = tiny.x[list(part)], outputs[index][:, list(part)]
        before = x.clone(), given.clone()
        found = editor.advance(x, dict(zip(step.branches, given, strict=True)), step, source)
        require(
            torch.equal(x, before[0]) and torch.equal(given, before[1]),
            "the tensors given to advance() left as they were", "a tensor changed in place",
            "return new latents",
        )  # fmt: skip
        require_kept(editor_contract.of_advance(found, x), "answer")
        return found

    whole = [advanced(tiny, range(FRAMES), index) for index in range(STEPS)]

    def compare(tiny: TinyEdit, part: range, where: str) -> None:
        for index in range(STEPS):
            alone, expected = advanced(tiny, part, index), whole[index][list(part)]
            require(
                torch.allclose(alone, expected, atol=ROUNDING, rtol=0),
                "advance() to treat every frame on its own",
                f"other latents for frames {list(part)} {where}",
                "go by source.frames, which has the frames' positions in the clip",
            )  # fmt: skip

    for part in PARTS:
        compare(tiny, part, "alone in a call")
    for part in PARTS:
        compare(dataclasses.replace(tiny.part(part), x=tiny.x), part, "alone on a rank")


def two_ranks_agree(editor: Editor, backbone: Backbone | None) -> None:
    # frames go one by one, so that no sum has another order and no match turns by rounding
    whole = TinyEdit.of(editor, backbone).edit(batch=1)
    halves = (range(FRAMES // 2), range(FRAMES // 2, FRAMES))
    tinies = [TinyEdit.of(copy.deepcopy(editor), backbone) for _ in halves]
    shown = range(FRAMES) if sees_all(Settings(), editor) else None  # as the engine does

    def edit(ranks: FrameGroup) -> Tensor:
        own = tinies[ranks.rank].part(halves[ranks.rank], shown)
        return own.edit(batch=1, ranks=ranks)

    shared = torch.cat(on_ranks(len(halves), edit))
    difference = float((shared - whole).abs().max())
    require(
        difference <= GUIDED * ROUNDING, "the same edit on two ranks as on one",
        f"a difference of {difference:.4g}",
        "go by positions in the clip, treat every frame on its own, and draw noise by its index",
    )  # fmt: skip


def same_without_the_source(editor: Editor, backbone: Backbone | None) -> None:
    cache, whole = SourceCache(), TinyEdit.of(copy.deepcopy(editor), backbone).edit(batch=1)
    other = dataclasses.replace(PROMPTS, prompt="a green cube")
    TinyEdit.of(copy.deepcopy(editor), backbone).edit(1, prompts=other, source_cache=cache)
    advice = (
        "let needs_source be True where a method reads or changes the source's branch, or change "
        "the edited branches by what the source's layers put out"
    )
    try:
        again = TinyEdit.of(editor, backbone).edit(1, source_cache=cache)
    except PluginError as error:
        reason = str(error).partition(" failed ")[2] or str(error)
        require(False, "the same edit without the source's branch", reason, advice)
        raise
    difference = float((again - whole).abs().max())
    require(
        difference <= GUIDED * ROUNDING, "the same edit without the source's branch",
        f"a difference of {difference:.4g}", advice,
    )  # fmt: skip


def determinism_from_the_seed(editor: Editor, backbone: Backbone | None) -> None:
    results = []
    for state in (0, 1):
        tiny = TinyEdit.of(editor, backbone)
        torch.manual_seed(state)
        results.append(tiny.edit())
    require(
        torch.equal(*results), "the same edit from the same seed, whatever torch's random state",
        f"results that differ by up to {float((results[0] - results[1]).abs().max()):.4g}",
        "draw with a torch.Generator seeded by start()'s seed and the frame's index, and keep "
        "nothing from one clip to the next",
    )  # fmt: skip


def clips_independent(editor: Editor, backbone: Backbone | None) -> None:
    def edited(editor: Editor, negated: bool) -> Tensor:
        return TinyEdit.of(editor, backbone, negated=negated).edit(consistency="none")

    alone = []
    for clip in (True, False):
        with anew(editor) as other:
            alone.append(edited(other, clip))
    difference = (
        torch.stack(alone) - torch.stack([edited(editor, c) for c in (True, False)])
    ).abs()
    require(
        not difference.any(), "the same edit of a clip whatever was edited before",
        f"results that differ by up to {float(difference.max()):.4g}",
        "make anew in prepare() whatever is kept of a clip",
    )  # fmt: skip


def inputs_unchanged(editor: Editor, backbone: Backbone | None) -> None:
    tiny = TinyEdit.of(editor, backbone)
    trajectory = tiny.trajectory
    tensors = [tiny.clip.frames[:], trajectory.latents, trajectory.clean, trajectory.noisiest]
    before = [tensor.clone() for tensor in tensors]
    tiny.edit()
    for index in range(STEPS):
        for batch in (tiny.source_batch(index), tiny.batch(range(FRAMES), index)):
            given = [batch.latents, *batch.conditioning.tensors.values()]
            tensors += given
            before += [tensor.clone() for tensor in given]
            editor.conditioning(batch)
            editor.model_inputs(batch)
    require(
        all(map(torch.equal, tensors, before)),
        "the clip, the trajectory and every pass left as they were", "one changed in place",
        "work on a copy: others use them too",
    )  # fmt: skip


def global_state_unchanged(editor: Editor, backbone: Backbone | None) -> None:
    with unchanged_state():
        TinyEdit.of(editor, backbone).edit()


class Counted(Editor):
    """Another editor's injections, which note that they are called and change nothing."""

    interface = 2

    def __init__(self, given: list[Injection]) -> None:
        self.given = given
        self.called: set[int] = set()

    def injections(self, model: Backbone) -> list[Injection]:
        def noted(number: int, edited: Tensor, source: Tensor, batch: Batch) -> Tensor:
            self.called.add(number)
            return edited

        return [
            dataclasses.replace(one, function=partial(noted, number))
            for number, one in enumerate(self.given)
        ]
