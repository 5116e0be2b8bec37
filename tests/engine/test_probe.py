"""What is seen of a site while a clip is edited."""

from __future__ import annotations

import pytest
import torch

from tests.engine.test_editing import edit, random_clip
from tokenflow.diffusion import Backbone
from tokenflow.engine.attention import self_attention_sites
from tokenflow.engine.probe import SHOWN, Observer
from tokenflow.errors import InputError
from tokenflow.propagation import NNField


def test_looking_on_changes_nothing(backbone: Backbone) -> None:
    observer, clip = Observer(), random_clip(7)
    plain = edit(backbone, clip, steps=3).latents
    assert torch.equal(edit(backbone, clip, steps=3, options={"observer": observer}).latents, plain)
    assert observer.seen is not None
    assert (observer.seen.step, observer.seen.steps) == (1, 3)
    assert "up_blocks" in observer.seen.site


def test_what_was_seen_is_what_the_kernel_says(backbone: Backbone) -> None:
    site = self_attention_sites(backbone.unet)[-1]
    observer = Observer(site, 0)
    edit(
        backbone, random_clip(6), steps=2, keyframe_every=6, batch=6, options={"observer": observer}
    )
    assert observer.seen is not None
    seen, ((window, found),) = observer.seen, observer.seen.parts
    (key,) = window.keyframes
    tokens = seen.tokens.flatten(1, 2)
    again = NNField().correspond(tokens, tokens[[key]], window)
    assert torch.equal(found.indices, again.indices)


def test_of_a_long_clip_only_what_is_shown_is_kept(backbone: Backbone) -> None:
    observer = Observer(frame=12)
    edit(
        backbone,
        random_clip(24),
        steps=1,
        keyframe_every=2,
        batch=1,
        options={"observer": observer},
    )
    assert observer.seen is not None
    assert observer.seen.frames == [0, 3, 7, 10, 13, 16, 20, 23]
    assert len(observer.seen.frames) == SHOWN
    kept = [frame for window, _ in observer.seen.parts for frame in window.frames]
    assert kept == sorted([*observer.seen.frames, 12])


@pytest.mark.parametrize("consistency", ["none", "joint"])
def test_without_propagation_there_is_nothing_to_see(backbone: Backbone, consistency: str) -> None:
    observer = Observer()
    edit(backbone, random_clip(2), steps=1, consistency=consistency, options={"observer": observer})
    assert observer.seen is None


def test_no_such_site_or_step(backbone: Backbone) -> None:
    with pytest.raises(InputError, match="expected a step from 0 to 1, got 2"):
        edit(backbone, random_clip(2), steps=2, options={"observer": Observer(step=2)})
    with pytest.raises(InputError, match="there is no site 'up'; expected one of down_blocks"):
        edit(backbone, random_clip(2), steps=2, options={"observer": Observer("up")})
