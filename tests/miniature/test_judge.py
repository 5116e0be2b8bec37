"""The embedded model and its judge, on seeds that neither was trained on."""

from __future__ import annotations

import pytest
import torch

from tokenflow.diffusion import Backbone
from tokenflow.diffusion.text_to_image import text_to_image
from tokenflow.metrics import judge_edit, psnr
from tokenflow.miniature.edits import SceneEdit
from tokenflow.miniature.judge import Judge, accuracy, labels
from tokenflow.miniature.scenes import VOCABULARY, Attributes, random_scene
from training.evaluate import BAR, HELD_OUT, round_trip_psnr


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.load()


@pytest.fixture(scope="module")
def miniature() -> Backbone:
    return Backbone.load("miniature", "cpu", "float32")


def test_labels_are_indices_into_the_vocabulary() -> None:
    assert labels(Attributes("dotted", "red", "star", "night")).tolist() == [2, 0, 2, 5]


def test_the_judge_knows_held_out_scenes(judge: Judge) -> None:
    scenes = [random_scene(HELD_OUT + 5000 + i) for i in range(300)]
    images = torch.stack([scene.frame(0) for scene in scenes])
    right = accuracy(judge, images, [scene.attributes for scene in scenes])
    assert min(right.values()) >= 0.97, right


def test_the_judge_is_not_pleased_by_anything(judge: Judge) -> None:
    images = torch.stack([random_scene(HELD_OUT + i).frame(0) for i in range(100)])
    wrong = [random_scene(HELD_OUT + 100 + i).attributes for i in range(100)]
    right = accuracy(judge, images, wrong)
    for name, words in VOCABULARY.items():
        assert right[name] < 2 / len(words) + 0.1


def test_the_autoencoder_keeps_held_out_scenes(miniature: Backbone) -> None:
    images = torch.stack([random_scene(HELD_OUT + 7000 + i).frame(0) for i in range(24)])
    assert round_trip_psnr(miniature, images) >= 28


@pytest.mark.full
def test_samples_show_what_the_prompt_says(judge: Judge) -> None:
    miniature = Backbone.load("miniature", "cpu", "auto")
    shown = [random_scene(HELD_OUT + 9000 + i).attributes for i in range(32)]
    images = text_to_image(miniature, [str(a) for a in shown], steps=10, guidance=3.0, seed=1)
    right = accuracy(judge, images, shown)
    # of these very samples, in float32 as in bfloat16
    measured = {"pattern": 22, "color": 32, "shape": 26, "background": 32}
    for name, count in measured.items():
        assert round(32 * right[name]) >= max(32 * BAR[name], count - 1), right


def test_a_perfect_edit_is_judged_perfect(judge: Judge) -> None:
    scene = random_scene(HELD_OUT + 1, 6, Attributes("plain", "red", "ball", "grass"))
    edit = SceneEdit(scene, Attributes("plain", "blue", "ball", "grass"))
    assert edit.changed == ("color",)
    truth = scene.with_attributes(color="blue").render()
    verdict = judge_edit(edit, truth, judge)
    assert verdict.edited >= 0.95
    assert verdict.kept >= 0.95
    noisy = (truth + 0.1 * torch.randn_like(truth)).clamp(0, 1)
    assert verdict.warp_error < judge_edit(edit, noisy, judge).warp_error / 5
    assert judge_edit(edit, edit.clip.frames, judge).edited <= 0.05
    assert psnr(truth, edit.clip.frames) < 40
