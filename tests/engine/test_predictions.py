"""The clean latents that each step of sampling predicts, as `on_prediction` is shown them."""

from __future__ import annotations

import pytest
from torch import Tensor

from tokenflow.diffusion import Backbone
from tokenflow.editors import DDCM, Editor, FlowEdit, PnP, SDEdit
from tokenflow.engine import Settings, edit_clip
from tokenflow.propagation import NNField
from tokenflow.testing import tiny_clip


@pytest.mark.parametrize("editor", [PnP(), SDEdit(0.5), FlowEdit(), DDCM()])
def test_the_last_prediction_is_the_result(backbone: Backbone, editor: Editor) -> None:
    shown: list[tuple[int, Tensor]] = []
    result = edit_clip(
        backbone, tiny_clip(3), "a blue ball", editor, NNField(), Settings(steps=4, fusion=0.0),
        on_prediction=lambda done, clean: shown.append((done, clean)),
    )  # fmt: skip
    assert [done for done, _ in shown] == [4 - len(shown) + 1 + i for i in range(len(shown))]
    assert len(shown) > 1
    # the last level of a schedule has noise left: there x is its prediction only nearly
    scale = result.latents.abs().mean()
    assert (shown[-1][1] - result.latents).abs().mean() < 0.1 * scale
    assert all(clean.isfinite().all() for _, clean in shown)
