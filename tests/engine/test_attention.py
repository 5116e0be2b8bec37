import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from tokenflow.diffusion import Backbone
from tokenflow.editors import Edit, Pass, PnP
from tokenflow.engine import Settings, attention, edit_clip
from tokenflow.engine.attention import (
    Bank,
    JointAttention,
    PropagatedAttention,
    installed,
    processors,
    self_attention_sites,
)
from tokenflow.errors import PluginError
from tokenflow.propagation import Correspondence, NNField
from tokenflow.video import Clip

BRANCHES, FRAMES, TOKENS, HEADS, WIDTH = 3, 4, 6, 2, 3
CHANNELS = HEADS * WIDTH


@pytest.fixture
def layer() -> Attention:
    """A self-attention as diffusers' transformer blocks make it."""
    torch.manual_seed(0)
    return Attention(CHANNELS, heads=HEADS, dim_head=WIDTH).requires_grad_(False)


@pytest.fixture
def tokens() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(BRANCHES * FRAMES, TOKENS, CHANNELS, generator=generator)


def naive_joint(layer: Attention, tokens: Tensor) -> Tensor:
    """Equation 3, one branch, frame, head and query at a time, in float64."""
    q, k, v = (
        nn.functional.linear(tokens.double(), projection.weight.double()).unflatten(
            0, (BRANCHES, FRAMES)
        )
        for projection in (layer.to_q, layer.to_k, layer.to_v)
    )
    result = torch.zeros_like(q)
    for branch, frame, head in itertools.product(range(BRANCHES), range(FRAMES), range(HEADS)):
        part = slice(head * WIDTH, (head + 1) * WIDTH)
        seen = [frame] if branch == 0 else list(range(FRAMES))
        keys = torch.cat([k[branch, f, :, part] for f in seen])
        values = torch.cat([v[branch, f, :, part] for f in seen])
        for query in range(TOKENS):
            scores = keys @ q[branch, frame, query, part] / math.sqrt(WIDTH)
            result[branch, frame, query, part] = scores.softmax(0) @ values
    out = layer.to_out[0]
    return nn.functional.linear(result, out.weight.double(), out.bias.double()).flatten(0, 1)


def test_joint_attention_agrees_with_a_naive_loop(layer: Attention, tokens: Tensor) -> None:
    result = JointAttention(BRANCHES)(layer, tokens)
    # float32 against float64: a few sums of at most 24 products of numbers near 1
    assert torch.allclose(result.double(), naive_joint(layer, tokens), rtol=0, atol=1e-5)


def test_the_source_branch_is_as_without_tokenflow(layer: Attention, tokens: Tensor) -> None:
    result, plain = JointAttention(BRANCHES)(layer, tokens), layer(tokens)
    # two orders of the same float32 operations
    assert torch.allclose(result[:FRAMES], plain[:FRAMES], rtol=0, atol=1e-6)
    assert not torch.allclose(result[FRAMES:], plain[FRAMES:], rtol=0, atol=1e-3)


def test_joint_attention_keeps_fused_kernels_and_repeats_nothing(
    layer: Attention, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def spy(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        seen.append((q, k, v))
        return nn.functional.scaled_dot_product_attention(q, k, v, **options)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", spy)
    JointAttention(BRANCHES)(layer, tokens)
    assert [tuple(k.shape) for _, k, _ in seen] == [
        (FRAMES, HEADS, TOKENS, WIDTH),
        (1, HEADS, FRAMES * TOKENS, WIDTH),
        (1, HEADS, FRAMES * TOKENS, WIDTH),
    ]
    for x in itertools.chain(*seen):
        assert x.ndim == 4
        assert x.numel() == FRAMES * TOKENS * CHANNELS


def test_the_bank_holds_what_went_in_and_what_came_out(layer: Attention, tokens: Tensor) -> None:
    bank = Bank()
    result = JointAttention(BRANCHES, "here", bank)(layer, tokens)
    assert torch.equal(bank.source["here"], tokens[:FRAMES])
    assert torch.equal(bank.outputs["here"], result.unflatten(0, (BRANCHES, FRAMES)))


def test_propagation_replaces_the_output_in_all_branches(layer: Attention, tokens: Tensor) -> None:
    outputs = torch.randn(BRANCHES, 2, TOKENS, CHANNELS)
    asked: list[Tensor] = []

    def take(source: Tensor) -> Tensor:
        asked.append(source)
        shift = torch.arange(TOKENS).roll(1) + TOKENS  # of the second keyframe
        indices = shift.expand(FRAMES, -1)[..., None]
        return Correspondence(indices, torch.ones(FRAMES, TOKENS, 1)).gather(outputs)

    result = PropagatedAttention(BRANCHES, take)(layer, tokens)
    assert torch.equal(asked[0], tokens[:FRAMES])
    expected = outputs[:, 1].roll(1, dims=1)[:, None].expand(-1, FRAMES, -1, -1)
    assert torch.equal(result.unflatten(0, (BRANCHES, FRAMES)), expected)


def test_sites_are_all_self_attentions(backbone: Backbone) -> None:
    expected = {
        f"{name}.processor"
        for name, module in backbone.unet.named_modules()
        if isinstance(module, Attention) and not module.is_cross_attention
    }
    sites = self_attention_sites(backbone.unet)
    assert len(sites) == 16  # two in each of three encoder blocks, one in the middle, nine above
    assert set(sites) == expected


def output(unet: UNet2DConditionModel) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(BRANCHES, 4, 8, 8, generator=generator)
    text = torch.randn(BRANCHES, 5, 16, generator=generator)
    with torch.no_grad():
        return unet(x, 500, encoder_hidden_states=text).sample


@contextmanager
def unchanged(unet: UNet2DConditionModel) -> Iterator[Tensor]:
    """Fails unless the UNet comes out of the block exactly as it went in; gives its output."""
    before, attention_processors = output(unet), dict(unet.attn_processors)
    yield before
    after = unet.attn_processors
    assert list(after) == list(attention_processors)
    assert all(after[site] is attention_processors[site] for site in after)
    for module in unet.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "forward" not in vars(module)
    assert torch.equal(output(unet), before)


def joint(_: str) -> JointAttention:
    return JointAttention(BRANCHES)


def test_processors_are_on_in_their_block_alone(backbone: Backbone) -> None:
    unet = backbone.unet
    with unchanged(unet) as before:
        with processors(unet, joint):
            changed = [s for s, p in unet.attn_processors.items() if isinstance(p, JointAttention)]
            assert changed == self_attention_sites(unet)
            assert output(unet).shape == before.shape
        with processors(unet, lambda _: lambda attn, x, *_, **__: torch.zeros_like(x)):
            assert not torch.allclose(output(unet), before)


def test_edits_are_on_in_their_block_alone(backbone: Backbone) -> None:
    unet = backbone.unet
    with unchanged(unet) as before:
        with installed(PnP().edits(unet), BRANCHES):
            edited = output(unet)
        assert not torch.allclose(edited, before)
        # nothing touches the source branch
        assert torch.equal(edited[0], before[0])


def test_an_edit_is_given_the_branches_and_the_source() -> None:
    module = nn.Identity()
    x = torch.arange(12.0).reshape(6, 2)  # three branches of two frames

    def add(edited: Tensor, source: Tensor) -> Tensor:
        assert torch.equal(source, x[:2])
        assert torch.equal(edited, x[2:].unflatten(0, (2, 2)))
        return edited + source

    with installed([Edit(module, add)], BRANCHES):
        assert torch.equal(module(x), torch.cat([x[:2], x[2:4] + x[:2], x[4:] + x[:2]]))
    assert torch.equal(module(x), x)


def raising(*_: Any, **__: Any) -> Any:
    raise RuntimeError("midway")


@pytest.mark.parametrize("where", ["block", "edit", "processor", "make"])
def test_nothing_remains_after_an_exception(backbone: Backbone, where: str) -> None:
    unet = backbone.unet
    edits: Sequence[Edit] = PnP().edits(unet)
    make: Callable[[str], Any] = joint
    if where == "edit":
        edits = [*edits, Edit(unet.up_blocks[2].resnets[0].conv2, raising)]
    elif where == "processor":
        last = self_attention_sites(unet)[-1]
        make = lambda site: raising if site == last else joint(site)  # noqa: E731
    elif where == "make":
        make = raising

    def run() -> None:
        with installed(edits, BRANCHES), processors(unet, make):
            output(unet)
            if where == "block":
                raising()

    with unchanged(unet), pytest.raises(RuntimeError, match="midway"):
        run()


def test_nothing_remains_after_edits_that_fail_to_install(backbone: Backbone) -> None:
    def edits() -> Iterator[Edit]:
        yield from PnP().edits(backbone.unet)
        raise RuntimeError("midway")

    with (
        unchanged(backbone.unet),
        pytest.raises(RuntimeError, match="midway"),
        installed(edits(), BRANCHES),
    ):
        pass


class RaisingPnP(PnP):
    """Raises at the second step, in its `calls`-th pass of the run."""

    def __init__(self, calls: int) -> None:
        super().__init__(attention=1.0, features=1.0)
        self.calls = calls

    def conditioning(self, forward: Pass) -> dict[str, Any]:
        self.calls -= len(forward.branches) == 3  # not inversion's
        return {} if self.calls else raising()


@pytest.mark.parametrize(
    ("consistency", "calls"), [("tokenflow", 4), ("tokenflow", 6), ("joint", 2), ("none", 3)]
)
def test_nothing_remains_after_a_clip_that_fails(
    backbone: Backbone, clip: Clip, consistency: Any, calls: int
) -> None:
    # tokenflow makes three passes a step: the keyframes', then two over the nine frames
    settings = Settings(steps=2, keyframe_every=4, consistency=consistency)
    with unchanged(backbone.unet), pytest.raises(PluginError, match=r"RaisingPnP .*midway"):
        edit_clip(backbone, clip, "a ball", RaisingPnP(calls), NNField(), settings=settings)


def test_nothing_remains_after_a_clip(backbone: Backbone, clip: Clip) -> None:
    settings = Settings(steps=2, keyframe_every=4)
    with unchanged(backbone.unet):
        edit_clip(backbone, clip, "a ball", PnP(), NNField(), settings=settings)
