"""Optical flow through the engine: who asks for it, how often, and who is refused."""

import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from tokenflow.cli.main import main
from tokenflow.diffusion import Backbone, invert
from tokenflow.editors import PnP, Prompts
from tokenflow.engine import Settings, edit_clip, edit_latents
from tokenflow.engine.resume import ResumeStore
from tokenflow.errors import InputError
from tokenflow.miniature.edits import SceneFlow
from tokenflow.miniature.scenes import random_scene
from tokenflow.propagation import (
    DIS,
    ClipFlow,
    Correspondence,
    FlowFiles,
    FlowWeighted,
    NNField,
    OpticalFlow,
    Propagation,
    Window,
)
from tokenflow.video import Clip, write_clip

pytestmark = pytest.mark.filterwarnings("ignore:the inversion prompt is empty")

PROMPTS = Prompts("a blue ball")
SIZE, FRAMES = 32, 7
SCENE = random_scene(5, FRAMES, size=SIZE)
CLIP = Clip.from_frames(SCENE.render(SIZE), name="scene")


class Counting(OpticalFlow):
    """A provider's flow, and how often each pair was asked for."""

    def __init__(self, flow: OpticalFlow) -> None:
        self.flow, self.asked = flow, Counter[tuple[int, int]]()

    def between(self, clip: Clip, start: int, end: int) -> Tensor:
        self.asked[start, end] += 1
        return self.flow.between(clip, start, end)


def edited(backbone: Backbone, kernel: Propagation, **settings: object) -> Tensor:
    chosen = Settings(**{"steps": 3, "keyframe_every": 3, "batch": 4, **settings})  # type: ignore
    return edit_clip(backbone, CLIP, PROMPTS, PnP(), kernel, chosen).clip.frames


@pytest.mark.parametrize("flow", [DIS(), SceneFlow(SCENE)])
@pytest.mark.parametrize("neighbours", ["bracketing", "previous"])
def test_every_frame_is_edited(backbone: Backbone, flow: OpticalFlow, neighbours: str) -> None:
    frames = edited(backbone, FlowWeighted(flow), neighbours=neighbours)
    assert frames.shape == CLIP.frames.shape
    assert frames.isfinite().all()
    assert ((frames - CLIP.frames).abs().amax(dim=(1, 2, 3)) > 0.01).all()
    assert (frames - edited(backbone, NNField(), neighbours=neighbours)).abs().max() > 1e-3


def test_batch_changes_nothing(backbone: Backbone) -> None:
    kernel = FlowWeighted(SceneFlow(SCENE))
    whole = edited(backbone, kernel, batch=7, steps=2)
    # as in test_edit: float32 with sums in another order
    assert (edited(backbone, kernel, batch=2, steps=2) - whole).abs().max() < 1e-4


def test_each_pair_is_computed_once_in_a_run(backbone: Backbone) -> None:
    flow = Counting(SceneFlow(SCENE))
    edited(backbone, FlowWeighted(flow), steps=4)
    assert set(flow.asked.values()) == {1}
    assert all(start != end for start, end in flow.asked)
    # a frame's keyframes are at most two windows of three frames away, less one
    assert all(abs(end - start) < 6 for start, end in flow.asked)
    assert all(flow.asked[end, start] for start, end in list(flow.asked))


def test_a_kernel_without_flow_gets_none(backbone: Backbone) -> None:
    class Plain(NNField):
        def correspond(self, source: Tensor, keys: Tensor, window: Window) -> Correspondence:
            assert window.motion is None
            return super().correspond(source, keys, window)

    edited(backbone, Plain(), steps=1)


@pytest.mark.parametrize("consistency", ["joint", "none"])
def test_no_flow_is_computed_where_nothing_is_propagated(
    backbone: Backbone, consistency: str
) -> None:
    flow = Counting(SceneFlow(SCENE))
    edited(backbone, FlowWeighted(flow), consistency=consistency, steps=1)
    assert not flow.asked


def test_latents_are_edited_with_a_given_flow(backbone: Backbone) -> None:
    schedule, kernel = backbone.schedule(2), FlowWeighted(SceneFlow(SCENE))
    trajectory = invert(backbone, backbone.encode(CLIP.frames), "", schedule, 2)
    flow = ClipFlow(CLIP, kernel.flow or DIS(), backbone.latent_scale)
    latents = edit_latents(
        backbone, trajectory, schedule, PROMPTS, PnP(), kernel, Settings(steps=2), flow=flow
    )
    assert latents.isfinite().all()
    with pytest.raises(InputError, match=r"FlowWeighted needs the clip's optical flow, got none; "):
        edit_latents(backbone, trajectory, schedule, PROMPTS, PnP(), kernel)


class Wrong(NNField):
    """The paper's kernel with its answer spoilt from the `good`-th call on."""

    def __init__(self, what: str, good: int = 0) -> None:
        super().__init__()
        self.what, self.good = what, good

    def correspond(self, source: Tensor, keys: Tensor, window: Window) -> Correspondence:
        found = super().correspond(source, keys, window)
        self.good -= 1
        if self.good >= 0:
            return found
        indices, weights = found.indices.clone(), found.weights.clone()
        match self.what:
            case "sum":
                weights *= 1.01
            case "nan":
                weights[-1, -1, -1] = math.nan
            case "negative":
                weights[0, 0] = torch.tensor([1.5, -0.5])
            case "range":
                indices[0, 0, 0] = keys.shape[0] * keys.shape[1]
            case "frames":
                indices, weights = indices[:1], weights[:1]
        return Correspondence(indices, weights)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("sum", "rows of weights that sum to 1, got sums from 1.01 to 1.01"),
        ("nan", "weights of 0 or more, got nan"),
        ("negative", "weights of 0 or more, got -0.5"),
        ("range", "expected indices from 0 to "),
        ("frames", r"expected indices of shape \(4, 128, taps\), got \(1, 128, 2\)"),
    ],
)
def test_a_wrong_kernel_is_caught_in_the_first_step(
    backbone: Backbone, what: str, message: str
) -> None:
    clip = Clip.from_frames(CLIP.frames[:, :, :16])
    settings = Settings(steps=2, keyframe_every=3, batch=4)
    site = r"Wrong of .* at down_blocks\.0\.\S+"
    before = dict(backbone.unet.attn_processors)
    with pytest.raises(InputError, match=f"{site}: .*{message}"):
        edit_clip(backbone, clip, PROMPTS, PnP(), Wrong(what), settings)
    assert backbone.unet.attn_processors == before


def test_later_windows_of_the_first_step_are_checked_too(backbone: Backbone) -> None:
    with pytest.raises(InputError, match=r"Wrong of .* at up_blocks\.3\.\S+: expected rows"):
        # the last of all sites in the second pass
        edited(backbone, Wrong("sum", good=2 * len(backbone.sites()) - 1), batch=2)


def test_later_steps_are_not_checked(backbone: Backbone) -> None:
    edited(backbone, Wrong("sum", good=2 * len(backbone.sites())), batch=2)


@pytest.fixture
def flow_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "flow"
    folder.mkdir()
    for i in range(FRAMES - 1):
        for start, end in ((i, i + 1), (i + 1, i)):
            np.save(folder / f"{start:03d}_{end:03d}.npy", SCENE.flow(start, end, SIZE).numpy())
    return folder


def test_a_missing_flow_file_stops_before_any_work(backbone: Backbone, flow_folder: Path) -> None:
    (flow_folder / "004_003.npy").unlink()
    stages: list[str] = []
    with pytest.raises(InputError, match=r"has no 4_3\.npy"):
        edit_clip(
            backbone, CLIP, PROMPTS, PnP(), FlowWeighted(FlowFiles(str(flow_folder))),
            on_step=lambda stage, step, steps: stages.append(stage),
        )  # fmt: skip
    assert not stages


def test_files_of_exact_flow_are_the_exact_flow(backbone: Backbone, flow_folder: Path) -> None:
    """In windows of two frames whose keyframe is the first, neighbouring frames are enough."""
    flow = Counting(SceneFlow(SCENE))

    def by(flow: OpticalFlow) -> Tensor:
        settings = {"keyframe_every": 2, "keyframes": "first", "steps": 1, "fusion": 0.0}
        return edited(backbone, FlowWeighted(flow), **settings)

    exact = by(flow)
    assert len(flow.asked) == 2 * (FRAMES - 1)
    assert torch.equal(by(FlowFiles(str(flow_folder))), exact)
    assert not torch.allclose(by(DIS()), exact, atol=1e-5)


@pytest.mark.parametrize("how", ["words", "yaml"])
def test_the_command_line_chooses_kernel_and_flow(
    model_folder: Path, tmp_path: Path, flow_folder: Path, how: str
) -> None:
    words = [
        f"--data.video={write_clip(tmp_path / 'scene.mp4', CLIP)}",
        f"--model.backbone={model_folder}",
        f"--model.prompt={PROMPTS.prompt}",
        "--model.steps=1",
        "--model.keyframe_every=4",
        f"--output.folder={tmp_path / 'runs'}",
        "--trainer.accelerator=cpu",
    ]
    if how == "words":
        words += ["--model.propagation=FlowWeighted", "--model.propagation.inconsistency=0.25"]
        words += ["--model.propagation.flow=DIS", "--model.propagation.flow.preset=fast"]
    else:
        config = tmp_path / "config.yaml"
        flow = {"class_path": "FlowFiles", "init_args": {"folder": str(flow_folder)}}
        chosen = {"class_path": "FlowWeighted", "init_args": {"flow": flow}}
        config.write_text(yaml.safe_dump({"model": {"propagation": chosen}}))
        words.append(f"--config={config}")
    main(["predict", *words])
    run = tmp_path / "runs" / "scene"
    kernel = yaml.safe_load((run / "run.yaml").read_text())["model"]["propagation"]
    assert kernel["class_path"].endswith("FlowWeighted")
    arguments = kernel["init_args"]
    if how == "words":
        assert arguments["inconsistency"] == 0.25
        assert arguments["flow"]["init_args"]["preset"] == "fast"
    else:
        assert arguments["flow"]["class_path"].endswith("FlowFiles")
    main(["predict", f"--config={run / 'run.yaml'}", f"--output.folder={tmp_path / 'again'}"])
    assert (tmp_path / "again" / "scene" / "edited.mp4").exists()


def test_the_command_line_tells_other_flow_files_apart(
    model_folder: Path, tmp_path: Path, flow_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str | None] = []

    def looked_at(*_: Any, store: ResumeStore, **__: Any) -> None:
        seen.append(store.propagation)
        raise InputError("seen")

    monkeypatch.setattr("tokenflow.engine.lightning.module.edit_clip", looked_at)
    words = [
        f"--data.video={write_clip(tmp_path / 'scene.mp4', CLIP)}",
        f"--model.backbone={model_folder}", f"--model.prompt={PROMPTS.prompt}",
        "--model.propagation=FlowWeighted", "--model.propagation.flow=FlowFiles",
        f"--model.propagation.flow.folder={flow_folder}", "--trainer.accelerator=cpu",
        f"--output.folder={tmp_path / 'runs'}",
    ]  # fmt: skip
    for changed in (False, False, True):
        if changed:
            os.utime(next(flow_folder.iterdir()), (1, 1))
        with pytest.raises(SystemExit):
            main(["predict", *words])
    assert seen[0] == seen[1] != seen[2]
