"""The suite: every kind of motion with every kind of edit, one clip each, from `suite.csv`."""

from __future__ import annotations

import csv
import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.scenes.bar import BarScene
from tokenflow.miniature.edits import SceneEdit
from tokenflow.miniature.scenes import Attributes, LayerPath, Scene, random_scene

FILE = Path(__file__).with_name("suite.csv")
MOTIONS = ("translation", "rotation", "scaling", "leaving", "bar", "pan", "fast")
EDITS = ("colour", "pattern", "background", "shape", "two")


@dataclass(frozen=True)
class Case:
    """One line of the suite: kinds of motion and edit, the scene's seed, and both captions."""

    motion: str
    edit: str
    seed: int
    source: str
    target: str

    def of(self, frames: int) -> SceneEdit:
        """The clip with so many frames, and what it is to become."""
        scene = random_scene(self.seed, frames, Attributes.parse(self.source))
        return SceneEdit(moved(scene, self.motion), Attributes.parse(self.target))


def true_edit(edit: SceneEdit) -> Scene:
    """The same scene with the edited attributes: what an edit of the clip should be."""
    return edit.scene.with_attributes(**{name: getattr(edit.target, name) for name in edit.changed})


def cases(file: Path = FILE) -> list[Case]:
    """All of a suite, in the file's order."""
    with file.open(newline="") as text:
        _, *lines = csv.reader(text)
    return [Case(motion, edit, int(seed), *texts) for motion, edit, seed, *texts in lines]


def moved(scene: Scene, motion: str) -> Scene:
    """The scene's layers on the paths of a kind of motion, around where the seed has put them.

    Speeds are in pixels per frame of 128x128, in a direction from the seed. Where nothing else is
    said, the object drifts by 1 and the background stands still.
    """
    frames = len(scene)
    t = torch.arange(frames, dtype=torch.float32) - (frames - 1) / 2
    share = torch.arange(frames) / max(frames - 1, 1)
    one, middle = torch.ones(frames), frames // 2
    # nearer to the middle than drawn, so that only who is to leave does so
    x, y = (64 + 0.4 * (axis[middle] - 64) for axis in (scene.object.x, scene.object.y))
    size = scene.object.scale[middle].clamp(26, 32) * one
    angle = scene.object.angle[middle] * one
    resting = LayerPath(x * one, y * one, size, angle)
    ground = scene.background
    still = LayerPath(ground.x[middle] * one, ground.y[middle] * one, one, 0 * one)

    def along(layer: LayerPath, speed: float) -> LayerPath:
        across, down = speed * math.cos(scene.phase), speed * math.sin(scene.phase)
        return dataclasses.replace(layer, x=layer.x + across * t, y=layer.y + down * t)

    obj, behind = along(resting, 1.0), still
    match motion:
        case "translation":
            obj = along(resting, 2.5)
        case "rotation":
            obj = dataclasses.replace(obj, angle=angle + 0.1 * t)
        case "scaling":
            obj = dataclasses.replace(obj, scale=size * torch.exp(0.04 * t))
        case "leaving":  # by a third, to the right, and back
            obj = dataclasses.replace(obj, x=84 + 36 * torch.sin(math.pi * share))
        case "pan":
            obj, behind = along(resting, 3.0), along(still, 3.0)
        case "fast":
            obj = along(resting, 6.0)
        case "bar":  # 14 pixels wide, from the object's one side to its other
            bar = LayerPath(x - 50 + 100 * share, 64 * one, 7 * one, 0 * one)
            return BarScene(scene.attributes, obj, behind, scene.texture, scene.phase, bar)
    return dataclasses.replace(scene, object=obj, background=behind)
