"""The checks of an editor: it changes what it says, for as long as it is on, and nothing else.

What several ranks rely on is checked by its cause, in one process: a frame's part of a pass does
not depend on which other frames are in the pass, and nothing on torch's global random state.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from tokenflow.diffusion import Backbone
from tokenflow.editors import Edit, Editor, Start
from tokenflow.testing.checks import Check, configuration_round_trip, require, run_all
from tokenflow.testing.stage import FRAMES, Stage

ROUNDING = 1e-4
"""float32 through a network, with sums in another order."""


def check_editor(editor: Editor, backbone: Backbone | None = None) -> None:
    """Runs all checks of an editor; raises `ConformanceError` at the first that fails."""
    run_all(editor_checks(editor, backbone))


def editor_checks(editor: Editor, backbone: Backbone | None = None) -> list[Check]:
    """All checks of an editor, to be called one by one.

    They run on a tiny random model, or on the `backbone` that the editor needs to fit.
    """
    functions = (
        start_shape, timesteps_of_the_schedule, edits_keep_shapes, result_shape, unet_restored,
        source_branch_unchanged, frames_independent_of_the_pass, constrain_per_frame,
        determinism_from_the_seed, inputs_unchanged,
    )  # fmt: skip
    watched = [Check(editor, function, (backbone,)) for function in functions]
    return [*watched, Check(editor, configuration_round_trip)]


def started(stage: Stage) -> Start:
    begin = stage.editor.start(stage.trajectory, stage.schedule, 0)
    require(
        isinstance(begin, Start), "a Start", type(begin).__name__,
        "return tokenflow.editors.Start(latents, timesteps)",
    )  # fmt: skip
    return begin


def start_shape(editor: Editor, backbone: Backbone | None) -> None:
    stage = Stage.of(editor, backbone)
    latents, clean = started(stage).latents, stage.trajectory.clean
    require(
        latents.shape == clean.shape and bool(latents.isfinite().all()),
        f"finite first latents of shape {tuple(clean.shape)}", tuple(latents.shape),
        "start from trajectory.at(t), or from noise of the same shape",
    )  # fmt: skip


def timesteps_of_the_schedule(editor: Editor, backbone: Backbone | None) -> None:
    stage = Stage.of(editor, backbone)
    timesteps, all_of_them = started(stage).timesteps, stage.schedule.timesteps
    require(
        bool(timesteps) and tuple(t for t in all_of_them if t in timesteps) == tuple(timesteps),
        f"some of the schedule's timesteps {all_of_them}, in their order", timesteps,
        "choose from schedule.timesteps, as schedule.timesteps[n:]",
    )  # fmt: skip


def edits_keep_shapes(editor: Editor, backbone: Backbone | None) -> None:
    stage = Stage.of(editor, backbone)
    unet, found = stage.backbone.unet, list(editor.edits(stage.backbone.unet))
    modules = set(unet.modules())
    for number, edit in enumerate(found):
        require(
            isinstance(edit, Edit) and edit.module in modules and 0 <= edit.until <= 1,
            "Edits of the UNet's modules, until from 0 to 1", f"{edit!r:.80} as number {number}",
            "make them from the modules of the UNet that edits() is given",
        )  # fmt: skip

    def watched(edit: Edit, number: int) -> Edit:
        def function(edited: Tensor, source: Tensor) -> Tensor:
            result = edit.function(edited, source)
            require(
                result.shape == edited.shape, f"the edited shape {tuple(edited.shape)}",
                f"{tuple(result.shape)} from edit {number}",
                "the function must return all edited branches and frames",
            )  # fmt: skip
            return result

        return dataclasses.replace(edit, function=function)

    edits = [watched(edit, number) for number, edit in enumerate(found)]
    stage.noise(range(FRAMES), stage.schedule.timesteps[0], edits)


def result_shape(editor: Editor, backbone: Backbone | None) -> None:
    stage = Stage.of(editor, backbone)
    result, clean = stage.edit(), stage.trajectory.clean
    require(
        result.shape == clean.shape and bool(result.isfinite().all()),
        f"finite edited latents of shape {tuple(clean.shape)}", tuple(result.shape),
        "look at what edits(), conditioning() and constrain() return",
    )  # fmt: skip


def unet_restored(editor: Editor, backbone: Backbone | None) -> None:
    stage = Stage.of(editor, backbone, prepare=False)
    unet = stage.backbone.unet

    def state() -> tuple[int, Tensor]:
        return hooks(unet), stage.noise(range(FRAMES), stage.schedule.timesteps[0], None)

    before, output = state()
    processors = dict(unet.attn_processors)
    editor.prepare(stage.backbone, stage.clip)
    stage.edit()
    after, again = state()
    require(
        before == after, f"{before} hooks on the UNet after an edit, as before", after,
        "return changes from edits() and leave installing them to the engine",
    )  # fmt: skip
    require(
        torch.equal(output, again) and processors == unet.attn_processors,
        "the UNet's output after an edit to be what it was, bit for bit",
        f"a difference of {float((output - again).abs().max()):.4g}",
        "do not change the UNet's weights, processors or methods",
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


def frames_independent_of_the_pass(editor: Editor, backbone: Backbone | None) -> None:
    stage = Stage.of(editor, backbone)
    edits = list(editor.edits(stage.backbone.unet))
    for t in stage.schedule.timesteps:
        whole = stage.noise(range(FRAMES), t, edits)
        for part in (range(1), range(1, FRAMES)):
            alone = stage.noise(part, t, edits)
            difference = float((alone - whole[:, list(part)]).abs().max())
            require(
                difference <= ROUNDING, "a frame's output not to depend on the pass's other frames",
                f"a difference of {difference:.4g} for frames {list(part)} at timestep {t}",
                "go by the pass's `frames`, treat every frame on its own, and draw noise per "
                "frame: which frames share a pass depends on the batch and on the ranks",
            )  # fmt: skip


def constrain_per_frame(editor: Editor, backbone: Backbone | None) -> None:
    stage = Stage.of(editor, backbone)
    for t in (stage.schedule.timesteps[-1], None):
        x = stage.x.clone()
        whole = editor.constrain(x, tuple(range(FRAMES)), t, stage.trajectory)
        require(
            torch.equal(x, stage.x), "the latents given to constrain() left as they were",
            "latents changed in place", "return new ones",
        )  # fmt: skip
        require(
            whole.shape == x.shape, f"latents of shape {tuple(x.shape)} from constrain()",
            tuple(whole.shape), "return as many frames as are given",
        )  # fmt: skip
        for part in (range(1), range(1, FRAMES)):
            alone = editor.constrain(x[list(part)], tuple(part), t, stage.trajectory)
            require(
                torch.allclose(alone, whole[list(part)], atol=ROUNDING, rtol=0),
                "constrain() to treat every frame on its own",
                f"other latents for frames {list(part)} where fewer are given",
                "go by `frames`, which says what positions in the clip the latents have",
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


def inputs_unchanged(editor: Editor, backbone: Backbone | None) -> None:
    stage = Stage.of(editor, backbone)
    trajectory = stage.trajectory
    tensors = (stage.clip.frames, trajectory.latents, trajectory.clean, trajectory.noisiest)
    before = [tensor.clone() for tensor in tensors]
    stage.edit()
    require(
        all(map(torch.equal, tensors, before)), "the clip and the trajectory left as they were",
        "one changed in place", "work on a copy: others use them too",
    )  # fmt: skip


def hooks(network: nn.Module) -> int:
    """How many hooks are on a network's modules."""
    return sum(
        len(hooks)
        for module in network.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks)
    )
