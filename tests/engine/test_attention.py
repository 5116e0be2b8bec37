import itertools
import math
from typing import Any

import pytest
import torch
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from tests.gaussian_flow import OneHead, Tokens
from tokenflow.diffusion.sites import DiffusersSite, StableDiffusion3Site
from tokenflow.engine.attention import (
    AttentionSwitch,
    Bank,
    JointAttention,
    Matcher,
    PropagatedAttention,
)
from tokenflow.engine.keyframes import neighbourhood, split_windows
from tokenflow.errors import PluginError
from tokenflow.propagation import Correspondence, Propagation, Window

BRANCHES, FRAMES, TOKENS, HEADS, WIDTH = 3, 4, 6, 2, 3
CHANNELS = HEADS * WIDTH
SIZE = (2, 3)


@pytest.fixture
def site() -> DiffusersSite:
    """A self-attention as diffusers' transformer blocks make it."""
    torch.manual_seed(0)
    layer = Attention(CHANNELS, heads=HEADS, dim_head=WIDTH)
    return DiffusersSite("here", layer.requires_grad_(False))


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


def test_joint_attention_agrees_with_a_naive_loop(site: DiffusersSite, tokens: Tensor) -> None:
    result = JointAttention(BRANCHES)(site, tokens)
    # float32 against float64: a few sums of at most 24 products of numbers near 1
    assert torch.allclose(result.double(), naive_joint(site.layer, tokens), rtol=0, atol=1e-5)


def test_scores_beyond_float16_are_those_of_upcast_attention(
    site: DiffusersSite, tokens: Tensor
) -> None:
    """SD 2.1's `upcast_attention`: fused kernels sum the products in float32 by themselves."""
    layer, x = site.layer, tokens[: 2 * FRAMES].half()
    layer.upcast_attention = True
    for projection in (layer.to_q, layer.to_k):
        projection.weight *= 1000
    layer.half()
    q, k, _ = site.qkv(x)
    assert (q.float() @ k.float().mT * layer.scale).max() > torch.finfo(torch.float16).max
    found = JointAttention(2)(site, x)
    layer.set_processor(AttnProcessor())  # which has no fused kernel, and upcasts
    own, joint = layer(x[:FRAMES]), layer(x[FRAMES:].flatten(0, 1)[None])
    # a few sums in float16 of numbers below 1
    torch.testing.assert_close(found[:FRAMES], own, atol=2e-3, rtol=0)
    torch.testing.assert_close(found[FRAMES:].flatten(0, 1)[None], joint, atol=2e-3, rtol=0)


def test_the_source_branch_is_as_without_tokenflow(site: DiffusersSite, tokens: Tensor) -> None:
    result, plain = JointAttention(BRANCHES)(site, tokens), site.layer(tokens)
    # two orders of the same float32 operations
    assert torch.allclose(result[:FRAMES], plain[:FRAMES], rtol=0, atol=1e-6)
    assert not torch.allclose(result[FRAMES:], plain[FRAMES:], rtol=0, atol=1e-3)


class Watched(TorchFunctionMode):
    """Keeps the queries, keys and values of every attention."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kw: Any = None) -> Any:
        if function is scaled_dot_product_attention:
            self.seen.append(args)
        return function(*args, **(kw or {}))


def test_joint_attention_keeps_fused_kernels_and_repeats_nothing(
    site: DiffusersSite, tokens: Tensor
) -> None:
    with Watched() as watched:
        JointAttention(BRANCHES)(site, tokens)
    assert [tuple(k.shape) for _, k, _ in watched.seen] == [
        (FRAMES, HEADS, TOKENS, WIDTH),
        (1, HEADS, FRAMES * TOKENS, WIDTH),
        (1, HEADS, FRAMES * TOKENS, WIDTH),
    ]
    for x in itertools.chain(*watched.seen):
        assert x.ndim == 4
        assert x.numel() == FRAMES * TOKENS * CHANNELS


def test_the_bank_has_what_went_in_and_what_came_out(site: DiffusersSite, tokens: Tensor) -> None:
    bank = Bank()
    result = JointAttention(BRANCHES, bank)(site, tokens)
    assert torch.equal(bank.source["here"], tokens[:FRAMES])
    assert torch.equal(bank.outputs["here"], result.unflatten(0, (BRANCHES, FRAMES)))


def test_keys_and_values_are_those_of_all_ranks(site: DiffusersSite, tokens: Tensor) -> None:
    """The second half of the keyframes is another rank's, and its last one this rank's halo."""
    whole = tokens.unflatten(0, (BRANCHES, FRAMES))
    own, others = (half.flatten(0, 1) for half in whole.split(2, dim=1))
    theirs: list[Tensor] = []
    JointAttention(BRANCHES, all_gather=lambda kv: theirs.append(kv) or kv)(site, others)
    bank = Bank()
    joint = JointAttention(
        BRANCHES,
        bank,
        all_gather=lambda kv: torch.cat([kv, theirs[0]]),
        exchange_halo=lambda seen: torch.cat([seen, seen[:1]]),
    )
    result = joint(site, own)
    expected = JointAttention(BRANCHES)(site, tokens).unflatten(0, (BRANCHES, FRAMES))
    # float32 sums over the keys in one order
    assert torch.allclose(result.unflatten(0, (BRANCHES, 2)), expected[:, :2], rtol=0, atol=1e-6)
    assert torch.equal(bank.source["here"], whole[0][[0, 1, 0]])
    assert bank.outputs["here"].shape == (BRANCHES, 3, TOKENS, CHANNELS)


class Second(Propagation):
    """Every token takes the one before it in the second keyframe."""

    def __init__(self) -> None:
        self.asked: list[tuple[Tensor, Tensor, Window]] = []

    def correspond(self, source: Tensor, keys: Tensor, window: Window) -> Correspondence:
        self.asked.append((source, keys, window))
        indices = (torch.arange(TOKENS).roll(1) + TOKENS).expand(FRAMES, -1)[..., None]
        return Correspondence(indices, torch.ones(FRAMES, TOKENS, 1))


def propagated(
    kernel: Propagation,
    tokens: Tensor,
    site: DiffusersSite,
    step: int = 3,
    matcher: Matcher | None = None,
    look: Any = None,
    **given: Any,
) -> tuple[Any, Bank]:
    """A propagated pass of four frames between the second and third of three keyframes."""
    generator = torch.Generator().manual_seed(2)
    bank = Bank(
        {"here": torch.randn(3, TOKENS, CHANNELS, generator=generator)},
        {"here": torch.randn(BRANCHES, 3, TOKENS, CHANNELS, generator=generator)},
    )
    window, used = neighbourhood(
        range(4, 8), split_windows(12, 4), (1, 4, 9), step=step, steps=9
    )  # fmt: skip
    assert used == [1, 2]
    matcher = matcher or Matcher(kernel, SIZE, look=look)
    attention = PropagatedAttention(BRANCHES, bank, matcher, window, used)
    return attention(site, tokens, **given), bank


def test_propagation_replaces_the_output_in_all_branches(
    site: DiffusersSite, tokens: Tensor
) -> None:
    kernel = Second()
    result, bank = propagated(kernel, tokens, site)
    expected = bank.outputs["here"][:, 2].roll(1, dims=1)[:, None].expand(-1, FRAMES, -1, -1)
    assert torch.equal(result.unflatten(0, (BRANCHES, FRAMES)), expected)


def test_where_tokens_are_not_matched_frames_attend_on_their_own(
    site: DiffusersSite, tokens: Tensor
) -> None:
    site.matched = False
    kernel, bank = Second(), Bank()
    result, _ = propagated(kernel, tokens, site)
    assert torch.equal(result, site.plain(tokens))
    assert not kernel.asked
    # jointly as everywhere, but nothing is left for the windows
    assert not torch.equal(JointAttention(BRANCHES, bank)(site, tokens), result)
    assert not bank.source
    assert not bank.outputs


def test_a_kernel_is_given_source_tokens_and_where_they_are(
    site: DiffusersSite, tokens: Tensor
) -> None:
    kernel = Second()
    shown: list[Any] = []
    _, bank = propagated(kernel, tokens, site, look=lambda *args: shown.append(args))
    ((source, keys, window),) = kernel.asked
    assert torch.equal(source, tokens[:FRAMES])
    assert torch.equal(keys, bank.source["here"][1:])
    assert (window.site, window.height, window.width) == ("here", *SIZE)
    assert (window.step, window.steps) == (3, 9)
    assert (window.frames, window.keyframes) == ((4, 5, 6, 7), (4, 9))
    assert window.motion is None
    ((seen, at, found),) = shown
    assert seen is source
    assert at is window
    assert isinstance(found, Correspondence)


class Wrong(Second):
    """Weights that do not sum to 1."""

    def correspond(self, source: Tensor, keys: Tensor, window: Window) -> Correspondence:
        found = super().correspond(source, keys, window)
        return Correspondence(found.indices, 2 * found.weights)


def test_answers_are_checked_in_the_first_step_that_runs(
    site: DiffusersSite, tokens: Tensor
) -> None:
    with pytest.raises(
        PluginError, match=r"Wrong of .* at here: expected rows of weights that sum"
    ):
        propagated(Wrong(), tokens, site)
    kernel = Second()
    matcher = Matcher(kernel, SIZE)
    propagated(kernel, tokens, site, step=3, matcher=matcher)
    matcher.kernel = Wrong()
    propagated(kernel, tokens, site, step=4, matcher=matcher)
    with pytest.raises(PluginError, match="expected rows of weights that sum"):
        propagated(kernel, tokens, site, step=3, matcher=matcher)


TEXTS = 5


@pytest.fixture
def text_site() -> StableDiffusion3Site:
    """A joint attention of image and text as SD 3's blocks make it."""
    torch.manual_seed(0)
    block = JointTransformerBlock(CHANNELS, HEADS, WIDTH)
    return StableDiffusion3Site("here", block.attn.requires_grad_(False))


@pytest.fixture
def texts() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(BRANCHES * FRAMES, TEXTS, CHANNELS, generator=generator)


def naive_text_attention(
    site: StableDiffusion3Site, tokens: Tensor, texts: Tensor, seen: list[list[int]]
) -> tuple[Tensor, Tensor]:
    """The attention of each row's tokens to those of the rows that it sees, one query at a time."""
    layer = site.layer

    def projected(image: nn.Linear, text: nn.Linear) -> Tensor:
        return torch.cat([image(tokens), text(texts)], dim=1).double()

    q = projected(layer.to_q, layer.add_q_proj)
    k, v = projected(layer.to_k, layer.add_k_proj), projected(layer.to_v, layer.add_v_proj)
    result = torch.zeros_like(q)
    for row, head in itertools.product(range(len(q)), range(HEADS)):
        part = slice(head * WIDTH, (head + 1) * WIDTH)
        keys = torch.cat([k[other, :, part] for other in seen[row]])
        values = torch.cat([v[other, :, part] for other in seen[row]])
        for query in range(q.shape[1]):
            scores = keys @ q[row, query, part] / math.sqrt(WIDTH)
            result[row, query, part] = scores.softmax(0) @ values
    image, text = result.float().split([TOKENS, TEXTS], dim=1)
    return layer.to_out[0](image), layer.to_add_out(text)


def test_text_tokens_of_all_keyframes_take_part_in_joint_attention(
    text_site: StableDiffusion3Site, tokens: Tensor, texts: Tensor
) -> None:
    bank = Bank()
    found = JointAttention(BRANCHES, bank)(text_site, tokens, encoder_hidden_states=texts)
    rows = range(BRANCHES * FRAMES)
    seen = [
        [row] if row < FRAMES else [row // FRAMES * FRAMES + frame for frame in range(FRAMES)]
        for row in rows
    ]
    expected = naive_text_attention(text_site, tokens, texts, seen)
    for ours, naive in zip(found, expected, strict=True):
        # float32 against float64: a few sums of at most 44 products of numbers near 1
        assert torch.allclose(ours, naive, rtol=0, atol=1e-5)
    assert torch.equal(bank.source["here"], tokens[:FRAMES])
    assert torch.equal(bank.outputs["here"], found[0].unflatten(0, (BRANCHES, FRAMES)))


def test_text_tokens_attend_to_their_own_frame_where_image_tokens_are_propagated(
    text_site: StableDiffusion3Site, tokens: Tensor, texts: Tensor
) -> None:
    kernel = Second()
    (image, text), bank = propagated(kernel, tokens, text_site, encoder_hidden_states=texts)
    expected = bank.outputs["here"][:, 2].roll(1, dims=1)[:, None].expand(-1, FRAMES, -1, -1)
    assert torch.equal(image.unflatten(0, (BRANCHES, FRAMES)), expected)
    ((source, *_),) = kernel.asked
    assert torch.equal(source, tokens[:FRAMES])
    own = [[row] for row in range(BRANCHES * FRAMES)]
    naive = naive_text_attention(text_site, tokens, texts, own)[1]
    assert torch.allclose(text, naive, rtol=0, atol=1e-5)


def test_a_switch_changes_all_sites_between_passes() -> None:
    layers = [Tokens(), Tokens()]
    switch = AttentionSwitch({f"{i}": OneHead(f"{i}", layer) for i, layer in enumerate(layers)})
    x = torch.randn(2, TOKENS, CHANNELS)
    plain = layers[0](x)

    def zero(site: Any, hidden_states: Tensor, **_: Any) -> Tensor:
        return torch.zeros_like(hidden_states)

    with switch.installed():
        assert all(torch.equal(layer(x), plain) for layer in layers)
        switch.attention = zero
        assert not any(layer(x).any() for layer in layers)
    assert all(torch.equal(layer(x), plain) for layer in layers)
