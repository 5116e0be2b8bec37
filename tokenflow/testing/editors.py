"""The checks of an editor: it changes what it says, for as long as it is on, and nothing else.

What several ranks rely on is checked by its causes, too, which say more of what is wrong: a frame's
part of a pass does not depend on which other frames are in the pass or were shown in `prepare`, and
nothing on torch's global random state.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor

from tokenflow.diffusion import Backbone, Trajectory
from tokenflow.editors import Edit, Editor, Start, contract
from tokenflow.engine import Settings
from tokenflow.engine.editing import conditions_all
from tokenflow.engine.ranks.group import FrameGroup
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
from tokenflow.testing.ranks import on_ranks
from tokenflow.testing.stage import FRAMES, PARTS, Stage
from tokenflow.testing.state import backbone_state

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
        start_shape, timesteps_of_the_schedule, start_per_frame, edits_keep_shape_and_dtype,
        result_shape, backbone_restored, source_branch_unchanged, source_condition_stated,
        content_of_frames, frames_independent_of_the_pass, batch_independent, constrain_per_frame,
        two_ranks_agree, determinism_from_the_seed, clips_independent, inputs_unchanged,
        global_state_unchanged,
    )  # fmt: skip
    watched = [Check(editor, function, (backbone,)) for function in functions]
    return [*watched, *(Check(editor, one) for one in (configuration_round_trip, interface_stated))]


def started(stage: Stage, *rules: str) -> Start:
    """What `start` returns, which keeps these rules of its contract."""
    begin = stage.editor.start(stage.trajectory, stage.schedule, 0)
    broken = contract.of_start(begin, stage.trajectory, stage.schedule)
    require_kept(broken, "form", *rules)
    return begin


def start_shape(editor: Editor, backbone: Backbone | None) -> None:
    started(Stage.of(editor, backbone), "finite")


def timesteps_of_the_schedule(editor: Editor, backbone: Backbone | None) -> None:
    started(Stage.of(editor, backbone), "timesteps")


def start_per_frame(editor: Editor, backbone: Backbone | None) -> None:
    stage = Stage.of(editor, backbone)
    begin = started(stage)
    for part in PARTS:
        whole = begin.latents[part.start : part.stop]
        other = editor.start(stage.part(part).trajectory, stage.schedule, 0)
        require(
            tuple(other.timesteps) == tuple(begin.timesteps),
            "the same timesteps, whichever frames a rank has",
            f"others where it has frames {list(part)} alone",
            "choose them by the schedule and the options alone",
        )  # fmt: skip
        alone = other.latents
        require(
            alone.shape == whole.shape and torch.allclose(alone, whole, atol=ROUNDING),
            "the same first latents of a frame, whichever others a rank has",
            f"others where it has frames {list(part)} alone",
            "treat every frame on its own, and draw noise by trajectory.positions, which says "
            "where in the clip they are",
        )  # fmt: skip


def edits_keep_shape_and_dtype(editor: Editor, backbone: Backbone | None) -> None:
    for dtype in (None, torch.bfloat16):
        stage = Stage.of(editor, backbone, dtype=dtype)
        edits = list(editor.edits(stage.backbone.unet))
        require_kept(contract.of_edits(edits, stage.backbone.unet), "edits")
        stage.noise(range(FRAMES), stage.schedule.timesteps[0], list(map(watched, edits)))


def watched(edit: Edit) -> Edit:
    """An edit whose answers are checked."""

    def function(edited: Tensor, source: Tensor) -> Tensor:
        result = edit.function(edited, source)
        require_kept(contract.of_edit(result, edited), "answer")
        return result

    return dataclasses.replace(edit, function=function)


def result_shape(editor: Editor, backbone: Backbone | None) -> None:
    stage = Stage.of(editor, backbone)
    result, clean = stage.edit(), stage.trajectory.clean
    require(
        result.shape == clean.shape and bool(result.isfinite().all()),
        f"finite edited latents of shape {tuple(clean.shape)}", tuple(result.shape),
        "look at what edits(), conditioning() and constrain() return",
    )  # fmt: skip


def backbone_restored(editor: Editor, backbone: Backbone | None) -> None:
    stage = Stage.of(editor, backbone, prepare=False)
    unet, t = stage.backbone.unet, stage.schedule.timesteps[0]
    processors = dict(unet.attn_processors)
    before, output = backbone_state(stage.backbone), stage.noise(range(FRAMES), t, None)
    editor.prepare(stage.backbone, stage.clip)
    stage.edit()
    after, again = backbone_state(stage.backbone), stage.noise(range(FRAMES), t, None)
    changed = [f"{value} {name}" for name, value in after.items() if before[name] != value]
    require(
        not changed, "the backbone after an edit to be what it was", ", ".join(changed),
        "return changes of the UNet from edits(), and leave installing them to the engine",
    )  # fmt: skip
    require(
        torch.equal(output, again) and processors == unet.attn_processors,
        "the UNet's output after an edit to be what it was, bit for bit",
        f"a difference of {float((output - again).abs().max()):.4g}",
        "do not change the UNet's processors",
    )  # fmt: skip


def source_branch_unchanged(editor: Editor, backbone: Backbone | None) -> None:
    stage = Stage.of(editor, backbone)
    for t in stage.schedule.timesteps:
        plain = stage.source_noise(t)
        edited = stage.noise(range(FRAMES), t, editor.edits(stage.backbone.unet))[0]
        difference = float((edited - plain).abs().max())
        require(
            difference <= ROUNDING, "the source branch's output as in inversion's pass",
            f"a difference of {difference:.4g} at timestep {t}",
            "do not write into the source that an edit is given, and condition its branch as in "
            "inversion: correspondences are found in it",
        )  # fmt: skip


def source_condition_stated(editor: Editor, backbone: Backbone | None) -> None:
    stage = Stage.of(editor, backbone)
    if editor.conditions_source:
        return
    for t in stage.schedule.timesteps:
        plain = stage.run(stage.source_pass(t), conditioned=False)[0]
        difference = float((stage.source_noise(t) - plain).abs().max())
        require(
            difference <= ROUNDING,
            "no influence on inversion's pass where conditions_source is False",
            f"a difference of {difference:.4g} at timestep {t}",
            "return {} where forward.branches is ('source',), or let conditions_source be True: "
            "else another editor's inversion would be taken from the cache",
        )  # fmt: skip


def content_of_frames(editor: Editor, backbone: Backbone | None) -> None:
    def said(editor: Editor) -> list[Any]:
        stage = Stage.of(editor, backbone)
        whole = list(map(editor.content, range(FRAMES)))
        return whole + [part for own in PARTS for part in map(stage.part(own).editor.content, own)]

    every, again = said(editor), said(copy.deepcopy(editor))
    wrong = [one for one in every if not isinstance(one, str)]
    require(not wrong, "content() to return text", wrong, "return a digest, or '' for nothing")
    require(
        every == again == 2 * every[:FRAMES], "the same content of a frame at every time",
        f"{every} and {again}",
        "make it of what files say of this frame alone: what runs keep is found again by it",
    )  # fmt: skip


def frames_independent_of_the_pass(editor: Editor, backbone: Backbone | None) -> None:
    stage = Stage.of(editor, backbone)
    unet, timesteps = stage.backbone.unet, stage.schedule.timesteps
    edits = list(editor.edits(unet))
    whole = {t: stage.noise(range(FRAMES), t, edits) for t in timesteps}

    def compare(part: range, edits: list[Edit], where: str) -> None:
        for t in timesteps:
            alone = stage.noise(part, t, edits)
            difference = float((alone - whole[t][:, list(part)]).abs().max())
            require(
                difference <= ROUNDING, "a frame's output not to depend on the pass's other frames",
                f"a difference of {difference:.4g} for frames {list(part)} {where} at timestep {t}",
                "go by the pass's `frames`, treat every frame on its own, and draw noise per "
                "frame: which frames share a pass depends on the batch and on the ranks",
            )  # fmt: skip

    for part in PARTS:
        compare(part, edits, "alone in a pass")
    for part in PARTS:
        stage.part(part)
        compare(part, list(editor.edits(unet)), "alone on a rank")


def batch_independent(editor: Editor, backbone: Backbone | None) -> None:
    stage = Stage.of(editor, backbone)
    # without propagation, in which rounding may turn a match
    results = [stage.edit(batch, consistency="none") for batch in (1, FRAMES)]
    difference = float((results[0] - results[1]).abs().max())
    require(
        difference <= GUIDED * ROUNDING, "the same edit whatever the batch",
        f"a difference of {difference:.4g}",
        "keep nothing from one call to the next: how many passes a step has is the engine's choice",
    )  # fmt: skip


def constrain_per_frame(editor: Editor, backbone: Backbone | None) -> None:
    stage = Stage.of(editor, backbone)
    times, whole = (stage.schedule.timesteps[-1], None), {}
    for t in times:
        x = stage.x.clone()
        whole[t] = editor.constrain(x, tuple(range(FRAMES)), t, stage.trajectory)
        require(
            torch.equal(x, stage.x), "the latents given to constrain() left as they were",
            "latents changed in place", "return new ones",
        )  # fmt: skip
        require_kept(contract.of_constrain(whole[t], x), "answer")

    def compare(part: range, trajectory: Trajectory, where: str) -> None:
        for t in times:
            alone = editor.constrain(stage.x[list(part)], tuple(part), t, trajectory)
            require(
                torch.allclose(alone, whole[t][list(part)], atol=ROUNDING, rtol=0),
                "constrain() to treat every frame on its own",
                f"other latents for frames {list(part)} {where}",
                "go by `frames`, which says what positions in the clip the latents have",
            )  # fmt: skip

    for part in PARTS:
        compare(part, stage.trajectory, "alone in a call")
    for part in PARTS:
        compare(part, stage.part(part).trajectory, "alone on a rank")


def two_ranks_agree(editor: Editor, backbone: Backbone | None) -> None:
    # frames go one by one, so that no sum has another order and no match turns by rounding
    whole = Stage.of(editor, backbone).edit(batch=1)
    halves = (range(FRAMES // 2), range(FRAMES // 2, FRAMES))
    stages = [Stage.of(copy.deepcopy(editor), backbone) for _ in halves]
    shown = range(FRAMES) if conditions_all(Settings(), editor) else None  # as the engine does

    def edit(group: FrameGroup) -> Tensor:
        own = stages[group.rank].part(halves[group.rank], shown)
        return own.edit(batch=1, group=group)

    shared = torch.cat(on_ranks(len(halves), edit))
    difference = float((shared - whole).abs().max())
    require(
        difference <= GUIDED * ROUNDING, "the same edit on two ranks as on one",
        f"a difference of {difference:.4g}",
        "go by positions in the clip, treat every frame on its own, and draw noise by its index",
    )  # fmt: skip


def determinism_from_the_seed(editor: Editor, backbone: Backbone | None) -> None:
    results = []
    for state in (0, 1):
        stage = Stage.of(editor, backbone)
        torch.manual_seed(state)
        results.append(stage.edit())
    require(
        torch.equal(*results), "the same edit from the same seed, whatever torch's random state",
        f"results that differ by up to {float((results[0] - results[1]).abs().max()):.4g}",
        "draw with a torch.Generator seeded by start()'s seed and the frame's index, and keep "
        "nothing from one clip to the next",
    )  # fmt: skip


def clips_independent(editor: Editor, backbone: Backbone | None) -> None:
    def edited(editor: Editor, negated: bool) -> Tensor:
        return Stage.of(editor, backbone, negated=negated).edit()

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
    stage = Stage.of(editor, backbone)
    trajectory = stage.trajectory
    tensors = [stage.clip.frames[:], trajectory.latents, trajectory.clean, trajectory.noisiest]
    before = [tensor.clone() for tensor in tensors]
    stage.edit()
    for t in stage.schedule.timesteps:
        for forward in (stage.source_pass(t), stage.sampling_pass(range(FRAMES), t)):
            given = [forward.latents, forward.embeddings]
            tensors += given
            before += [tensor.clone() for tensor in given]
            editor.conditioning(forward)
    require(
        all(map(torch.equal, tensors, before)),
        "the clip, the trajectory and every pass left as they were", "one changed in place",
        "work on a copy: others use them too",
    )  # fmt: skip


def global_state_unchanged(editor: Editor, backbone: Backbone | None) -> None:
    with unchanged_state():
        Stage.of(editor, backbone).edit()
