"""The miniature distilled to few steps: its samples, and edits by it without inversion, judged."""

from __future__ import annotations

from statistics import mean

import pytest
import torch

from tokenflow.diffusion import Backbone
from tokenflow.diffusion.backbone import EMBEDDED
from tokenflow.editors import DDCM
from tokenflow.engine import Settings, edit_clip
from tokenflow.metrics import judge_edit
from tokenflow.miniature.edits import suite
from tokenflow.miniature.judge import Judge, accuracy
from tokenflow.miniature.scenes import random_scene
from tokenflow.propagation import NNField
from training.evaluate import FEW_STEP_BAR, HELD_OUT, few_step_images

MODEL = "miniature-lcm"


@pytest.mark.full
def test_samples_of_four_steps_show_what_the_prompt_says() -> None:
    """Those of training/README.md."""
    shown = [random_scene(HELD_OUT + i).attributes for i in range(96)]
    batches = [(i, [str(one) for one in shown[i : i + 16]]) for i in range(0, 96, 16)]
    model = str(EMBEDDED[MODEL])
    images = [few_step_images(model, prompts, 4, 3.0, HELD_OUT + i) for i, prompts in batches]
    right = accuracy(Judge.load(), torch.cat(images), shown)
    assert all(right[name] >= bar for name, bar in FEW_STEP_BAR.items()), right


@pytest.mark.full
def test_edits_without_inversion_show_what_was_asked_for_and_keep_the_rest() -> None:
    """Of the blue ball and the ring on water; as measured, all frames are right."""
    backbone, judge = Backbone.load(MODEL, "cpu", "auto"), Judge.load()
    verdicts = []
    for edit in suite(8)[::3]:
        result = edit_clip(
            backbone, edit.clip, edit.prompts, DDCM(noise="shared"), NNField(),
            Settings(steps=8, keyframe_every=4),
        )  # fmt: skip
        verdicts.append(judge_edit(edit, result.clip.frames, judge))
    assert mean(one.edited for one in verdicts) >= 0.9, verdicts
    assert mean(one.kept for one in verdicts) >= 0.9, verdicts
