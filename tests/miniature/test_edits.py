"""The method judged: four edits of moving scenes, by TokenFlow and frame by frame."""

from __future__ import annotations

from statistics import mean

import pytest
import torch

from tokenflow.diffusion import Backbone, invert
from tokenflow.engine import Settings, edit_latents
from tokenflow.metrics import Verdict, judge_edit
from tokenflow.miniature.edits import EDITOR, suite
from tokenflow.miniature.judge import Judge
from tokenflow.propagation import NNField

pytestmark = pytest.mark.timeout(3000)  # minutes of edits, on one thread

# frames and steps; docs/miniature.md has the long form's table, and more
FORMS = [
    pytest.param((12, 10), id="12 frames, 10 steps"),
    pytest.param((24, 15), id="24 frames, 15 steps", marks=pytest.mark.full),
]

Verdicts = dict[str, list[Verdict]]


@pytest.fixture(scope="module", params=FORMS)
def verdicts(request: pytest.FixtureRequest) -> Verdicts:
    """What the judge and the true motion say of each clip: edited in two ways, and not at all."""
    frames, steps = request.param
    backbone, judge = Backbone.load("miniature", device="cpu"), Judge.load()
    schedule = backbone.schedule(steps)
    found: Verdicts = {"tokenflow": [], "none": [], "round trip": []}
    for edit in suite(frames):
        source = str(edit.scene.attributes)
        latents = torch.cat([backbone.encode(x) for x in edit.clip.frames.split(8)])
        found["round trip"].append(judge_edit(edit, backbone.decode(latents), judge))
        trajectory = invert(backbone, latents, source, schedule, steps)
        for way in ("tokenflow", "none"):
            settings = Settings(steps=steps, guidance=4.0, consistency=way)  # type: ignore[arg-type]
            edited = edit_latents(
                backbone,
                trajectory,
                schedule,
                EDITOR,
                NNField(),
                str(edit.target),
                inversion_prompt=source,
                settings=settings,
            )
            found[way].append(judge_edit(edit, backbone.decode(edited), judge))
    return found


def test_edits_show_what_was_asked_for_and_keep_the_rest(verdicts: Verdicts) -> None:
    assert mean(v.edited for v in verdicts["tokenflow"]) >= 0.85, verdicts
    assert mean(v.kept for v in verdicts["tokenflow"]) >= 0.85, verdicts


def test_an_unedited_clip_is_not_judged_edited(verdicts: Verdicts) -> None:
    assert mean(v.edited for v in verdicts["round trip"]) <= 0.05


def test_propagation_halves_the_warp_error_above_the_round_trip(verdicts: Verdicts) -> None:
    floor, error, per_frame = (
        mean(v.warp_error for v in verdicts[way]) for way in ("round trip", "tokenflow", "none")
    )
    assert floor < error
    assert error - floor <= 0.5 * (per_frame - floor), verdicts
