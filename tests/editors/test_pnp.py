from contextlib import ExitStack
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler

from tokenflow.diffusion import Backbone, Schedule, Trajectory
from tokenflow.editors import Editor, Pass, PnP, Start
from tokenflow.editors.pnp import decoder_layers, take_source
from tokenflow.engine.attention import installed
from tokenflow.engine.denoising import BRANCHES, Denoiser
from tokenflow.engine.ranks.group import FrameGroup
from tokenflow.errors import InputError


@pytest.fixture
def trajectory() -> Trajectory:
    """Random latents, of inversion that went beyond the first of three sampling timesteps."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(5, 2, 4, 8, 8, generator=generator)
    return Trajectory((667, 334, 1), latents[:3], latents[3], latents[4], 0.006)


@pytest.fixture
def schedule(backbone: Backbone) -> Schedule:
    return backbone.schedule(3)


def test_the_layers_are_the_papers(backbone: Backbone) -> None:
    up = backbone.unet.up_blocks
    assert len(decoder_layers(backbone.unet)) == 12
    attentions = [
        up[block].attentions[i].transformer_blocks[0].attn1
        for block, i in [(1, 1), (1, 2), (2, 0), (2, 1), (2, 2), (3, 0), (3, 1), (3, 2)]
    ]
    features, *rest = PnP(attention=0.3, features=0.7).edits(backbone.unet)
    assert features.module is up[1].resnets[1].conv2
    assert features.until == 0.7
    expected = [module for a in attentions for module in (a.to_q, a.to_k)]
    assert len(rest) == len(expected) == 16
    assert all(edit.module is module for edit, module in zip(rest, expected, strict=True))
    assert {edit.until for edit in rest} == {0.3}
    assert all(edit.function is take_source for edit in (features, *rest))


def test_more_layers_take_features(backbone: Backbone) -> None:
    up = backbone.unet.up_blocks
    edits = PnP(features=0.7, feature_layers=3).edits(backbone.unet)
    expected = [up[1].resnets[1].conv2, up[1].resnets[2].conv2, up[2].resnets[0].conv2]
    assert [edit.module for edit in edits if edit.until == 0.7] == expected


def test_the_edited_branches_take_the_sources_output() -> None:
    edited, source = torch.randn(2, 3, 5, 4), torch.randn(3, 5, 4)
    result = take_source(edited, source)
    assert result.shape == edited.shape
    assert all(torch.equal(branch, source) for branch in result)


def test_all_branches_are_equal_where_features_are_injected(backbone: Backbone) -> None:
    seen: dict[str, torch.Tensor] = {}
    unet = backbone.unet
    modules = {
        "features": unet.up_blocks[1].resnets[1].conv2,
        "queries": unet.up_blocks[3].attentions[2].transformer_blocks[0].attn1.to_q,
        "keys": unet.up_blocks[1].attentions[1].transformer_blocks[0].attn1.to_k,
        "values": unet.up_blocks[1].attentions[1].transformer_blocks[0].attn1.to_v,
        "before": unet.up_blocks[1].resnets[0].conv2,
    }
    with installed(PnP().edits(unet), BRANCHES), torch.no_grad(), ExitStack() as hooks:
        for name, module in modules.items():
            # later than the edits' hooks, so that it is given what they return
            hook = module.register_forward_hook(
                lambda m, i, out, name=name: seen.update({name: out})
            )
            hooks.enter_context(hook)
        unet(torch.randn(6, 4, 8, 8), 1, encoder_hidden_states=torch.randn(6, 3, 16))

    def equal(name: str) -> bool:
        source, *edited = seen[name].chunk(BRANCHES)
        return all(torch.equal(branch, source) for branch in edited)

    assert [name for name in modules if equal(name)] == ["features", "queries", "keys"]


@pytest.mark.parametrize(
    ("steps", "until", "expected"),
    [
        *((1, 0.0, 0), (1, 0.5, 0), (1, 1.0, 1), (3, 0.5, 1), (3, 0.99, 2)),
        *((7, 0.0, 0), (7, 0.3, 2), (7, 0.5, 3), (7, 0.8, 5), (7, 1.0, 7)),
    ],
)
def test_edits_are_on_while_i_is_below_int_of_n_times_until(
    backbone: Backbone, steps: int, until: float, expected: int
) -> None:
    schedule = backbone.schedule(steps)
    empty = torch.zeros(steps, 1, 4, 8, 8)
    trajectory = Trajectory(schedule.timesteps, empty, empty[0], empty[0], 0.5)
    editor = PnP(attention=until, features=1.0)
    group = FrameGroup()
    denoiser = Denoiser(
        backbone, trajectory, schedule, editor, torch.zeros(3, 2, 16), 7.5, 8, None,
        group, group.share([trajectory.positions]),
    )  # fmt: skip
    projection = backbone.unet.up_blocks[2].attentions[0].transformer_blocks[0].attn1.to_k
    features = backbone.unet.up_blocks[1].resnets[1].conv2
    on = []
    for t in schedule.timesteps:
        with denoiser.edited(t):
            assert len(features._forward_hooks) == 1
            on.append(len(projection._forward_hooks))
    assert on == [1] * expected + [0] * (steps - expected)


def test_starts_at_the_inverted_latent(trajectory: Trajectory, schedule: Schedule) -> None:
    start = PnP().start(trajectory, schedule, 0)
    assert torch.equal(start.latents, trajectory.latents[0])
    assert start.timesteps == schedule.timesteps


def test_renoised_adds_the_noisiest_latents_noise(
    trajectory: Trajectory, schedule: Schedule, backbone: Backbone
) -> None:
    start = PnP(start_from="renoised").start(trajectory, schedule, 0)
    noisiest, clean, a = trajectory.noisiest, trajectory.clean, trajectory.noisiest_alpha
    noise = (noisiest - a**0.5 * clean) / (1 - a) ** 0.5
    scheduler = backbone.scheduler
    assert isinstance(scheduler, DDIMScheduler)
    expected = scheduler.add_noise(clean, noise, torch.tensor([schedule.timesteps[0]] * 2))
    # the same formula with float32 instead of float64 factors
    assert torch.allclose(start.latents, expected, rtol=0, atol=1e-5)
    assert start.timesteps == schedule.timesteps


def test_renoised_is_the_inverted_latent_where_inversion_ended_there(schedule: Schedule) -> None:
    latents = torch.randn(4, 2, 4, 8, 8)
    a = schedule.alpha(schedule.timesteps[0])
    trajectory = Trajectory(schedule.timesteps, latents[:3], latents[3], latents[0], a)
    start = PnP(start_from="renoised").start(trajectory, schedule, 0)
    # noise taken off and put on again, in float32
    assert torch.allclose(start.latents, latents[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": -0.1}, r"attention is a share of the steps from 0 to 1, got -0\.1"),
        ({"attention": 1.5}, r"attention is a share .* got 1\.5"),
        ({"features": float("nan")}, "features is a share .* got nan"),
        ({"features": 2.0}, "features is a share"),
        ({"feature_layers": 0}, "feature_layers must be at least 1, got 0"),
        ({"start_from": "noise"}, "start_from must be 'inverted' or 'renoised', got 'noise'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        PnP(**options)


def test_an_editor_need_only_say_where_it_starts(backbone: Backbone, schedule: Schedule) -> None:
    class Plain(Editor):
        def start(self, trajectory: Trajectory, schedule: Schedule, seed: int) -> Start:
            return Start(trajectory.at(schedule.timesteps[0]), schedule.timesteps)

    assert list(Plain().edits(backbone.unet)) == []
    forward = Pass(("source",), (0,), torch.zeros(1, 1, 4, 8, 8), torch.zeros(1, 2, 8), 1, 0.5)
    assert Plain().conditioning(forward) == {}
