"""What is seen of a site while a clip is edited."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.engine.test_edit import edit, random_clip
from tokenflow.diffusion import Backbone
from tokenflow.engine.probe import SHOWN, Probe
from tokenflow.errors import InputError
from tokenflow.propagation import NNField
from tokenflow.runs.observed import Observed


def observed(
    backbone: Backbone,
    frames: int,
    site: str | None = None,
    step: int | None = None,
    frame: int | None = None,
    **settings: Any,
) -> Observed | None:
    """What a probe sees of the edit of a random clip."""
    steps = settings.setdefault("steps", 1)
    probe = Probe(backbone.sites(), range(frames), steps, site, step, frame)
    edit(backbone, random_clip(frames), options={"look": probe}, **settings)
    return probe.seen


def test_a_probe_changes_nothing(backbone: Backbone) -> None:
    clip = random_clip(7)
    probe = Probe(backbone.sites(), range(7), 3)
    plain = edit(backbone, clip, steps=3).latents
    assert torch.equal(edit(backbone, clip, steps=3, options={"look": probe}).latents, plain)
    assert probe.seen is not None
    assert (probe.seen.step, probe.seen.steps) == (1, 3)
    assert "up_blocks" in probe.seen.site


def test_what_was_seen_is_what_the_kernel_says(backbone: Backbone) -> None:
    site = list(backbone.sites())[-1]
    seen = observed(backbone, 6, site, 0, steps=2, keyframe_every=6, batch=6)
    assert seen is not None
    tokens, frames = seen.tokens.flatten(1, 2), list[int]()
    for window, found in seen.parts:
        assert (window.site, window.step) == (site, 0)
        (key,) = window.keyframes
        again = NNField().correspond(tokens[list(window.frames)], tokens[[key]], window)
        assert torch.equal(found.indices, again.indices)
        frames += window.frames
    assert sorted(frames) == list(range(6))


def test_of_a_long_clip_only_what_is_shown_is_kept(backbone: Backbone) -> None:
    seen = observed(backbone, 24, frame=12, keyframe_every=2, batch=1)
    assert seen is not None
    assert seen.frames == [0, 3, 7, 10, 13, 16, 20, 23]
    assert len(seen.frames) == SHOWN
    kept = [frame for window, _ in seen.parts for frame in window.frames]
    assert sorted(kept) == sorted([*seen.frames, 12])


@pytest.mark.parametrize("consistency", ["none", "joint"])
def test_without_propagation_there_is_nothing_to_see(backbone: Backbone, consistency: str) -> None:
    assert observed(backbone, 2, consistency=consistency) is None


def test_no_such_site_or_step(backbone: Backbone) -> None:
    with pytest.raises(InputError, match="expected a step from 0 to 1, got 2"):
        Probe(backbone.sites(), range(2), 2, step=2)
    with pytest.raises(InputError, match="there is no site 'up'; expected one of down_blocks"):
        Probe(backbone.sites(), range(2), 2, "up")
