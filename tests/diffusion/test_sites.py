from typing import Any

import pytest
import torch
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_flux import (
    FluxPosEmbed,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from tokenflow.diffusion import Site, StableDiffusion
from tokenflow.diffusion.sites import (
    DiffusersSite,
    FluxSingleSite,
    FluxSite,
    StableDiffusion3Site,
)

TOKENS, CHANNELS, HEADS = 6, 8, 2


def site_of(cross: int | None = None, **options: Any) -> DiffusersSite:
    """An attention layer as diffusers' transformer blocks make it."""
    torch.manual_seed(0)
    layer = Attention(CHANNELS, cross, heads=HEADS, dim_head=CHANNELS // HEADS, **options)
    return DiffusersSite("here", layer.requires_grad_(False))


@pytest.mark.parametrize(
    "options",
    [{}, {"scale_qk": False}, {"rescale_output_factor": 2.0}, {"bias": True}, {"cross": 5}],
    ids=str,
)
def test_qkv_and_output_make_up_the_layers_attention(options: dict[str, Any]) -> None:
    site, x = site_of(**options), torch.randn(3, TOKENS, CHANNELS)
    text = {"encoder_hidden_states": torch.randn(3, 4, 5)} if "cross" in options else {}
    q, k, v = site.qkv(x, **text)
    assert q.shape == (3, HEADS, TOKENS, CHANNELS // HEADS)
    assert k.shape == v.shape == (3, HEADS, 4 if text else TOKENS, CHANNELS // HEADS)
    found = site.output(scaled_dot_product_attention(q, k, v, scale=site.scale))
    # the same float32 operations in another order
    assert torch.allclose(found, site.layer(x, **text), rtol=0, atol=1e-6)
    assert torch.equal(site.plain(x, **text), site.layer(x, **text))


class Double:
    """Twice the layer's own output; keeps what it was called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[Site, dict[str, Any]]] = []

    def attention(self, site: Site, hidden_states: Tensor, *args: Any, **given: Any) -> Tensor:
        self.calls.append((site, given))
        return 2 * site.plain(hidden_states, *args, **given)


def test_a_replacement_is_on_in_its_block_alone() -> None:
    site, x, text = site_of(cross=5), torch.randn(3, TOKENS, CHANNELS), torch.randn(3, 4, 5)
    before, processor = site.layer(x, text), site.layer.processor
    double = Double()
    with site.replaced(double):
        assert torch.equal(site.layer(x, text), 2 * before)
    ((seen, given),) = double.calls
    assert seen is site
    assert given["encoder_hidden_states"] is text
    assert site.layer.processor is processor
    assert torch.equal(site.layer(x, text), before)


def test_the_layers_processor_returns_after_an_exception() -> None:
    site = site_of()
    processor = site.layer.processor

    def fail() -> None:
        with site.replaced(Double()):
            raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        fail()
    assert site.layer.processor is processor


def test_a_replacement_may_change_between_calls() -> None:
    """The switch that the engine relies on: nothing is installed anew."""
    site, x = site_of(), torch.randn(3, TOKENS, CHANNELS)
    plain = site.layer(x)

    class Switch:
        attention: Any = Double().attention

    switch = Switch()
    with site.replaced(switch):
        installed = site.layer.processor
        assert torch.equal(site.layer(x), 2 * plain)
        switch.attention = lambda site, hidden_states, **_: torch.zeros_like(hidden_states)
        assert not site.layer(x).any()
        assert site.layer.processor is installed


@pytest.mark.parametrize(("cross", "kind"), [(False, "attn1"), (True, "attn2")])
def test_sites_are_all_attentions_of_a_kind(
    backbone: StableDiffusion, cross: bool, kind: str
) -> None:
    expected = [
        name
        for name, module in backbone.unet.named_modules()
        if isinstance(module, Attention) and name.endswith(kind)
    ]
    sites = backbone.cross_attention() if cross else backbone.sites()
    assert len(sites) == 10  # one in each of three encoder blocks, one in the middle, six above
    assert set(sites) == set(expected)
    for name, site in sites.items():
        assert site.name == name
        assert site.layer is backbone.network.get_submodule(name)
        assert site.layer.to_k.in_features == (16 if cross else site.layer.to_q.in_features)


TEXTS = 4


def randomised(block: nn.Module) -> nn.Module:
    """With norms' weights that are not 1, so that they cannot be forgotten."""
    for parameter in block.requires_grad_(False).parameters():
        nn.init.uniform_(parameter, -0.5, 1.5)
    return block


def joint_site(kind: str) -> tuple[Site, dict[str, Any]]:
    """A site with text in its sequence, and what its block calls it with."""
    torch.manual_seed(0)
    image, text = torch.randn(3, TOKENS, CHANNELS), torch.randn(3, TEXTS, CHANNELS)
    width = CHANNELS // HEADS
    if kind.startswith("sd3"):
        block = JointTransformerBlock(
            CHANNELS, HEADS, width, kind == "sd3, last block", None if kind == "sd3" else "rms_norm"
        )
        layer = randomised(block).attn
        site: Site = StableDiffusion3Site("here", layer)
        return site, {"hidden_states": image, "encoder_hidden_states": text}
    ids = torch.cat([torch.zeros(TEXTS, 2), torch.arange(2.0 * TOKENS).view(TOKENS, 2)])
    rotary = FluxPosEmbed(theta=100, axes_dim=[2, 2])(ids)
    if kind == "flux":
        layer = randomised(FluxTransformerBlock(CHANNELS, HEADS, width)).attn
        given = {"hidden_states": image, "encoder_hidden_states": text, "image_rotary_emb": rotary}
        return FluxSite("here", layer), given
    layer = randomised(FluxSingleTransformerBlock(CHANNELS, HEADS, width)).attn
    given = {"hidden_states": torch.cat([text, image], dim=1), "image_rotary_emb": rotary}
    return FluxSingleSite("here", layer, lambda: TEXTS), given


JOINT = ("sd3", "sd3, norms", "sd3, last block", "flux", "flux, single block")


@pytest.mark.parametrize("kind", JOINT)
def test_image_and_text_tokens_make_up_the_layers_attention(kind: str) -> None:
    site, given = joint_site(kind)
    q, k, v = site.qkv(**given)
    assert q.shape == k.shape == v.shape == (3, HEADS, TOKENS + TEXTS, CHANNELS // HEADS)
    image = site.image(**given)
    assert image.shape == (3, TOKENS, CHANNELS)
    attended = scaled_dot_product_attention(q, k, v, scale=site.scale)
    output = site.output(attended[:, :, :TOKENS], **given)
    found = site.joined(output, attended[:, :, TOKENS:], **given)
    expected = site.layer(**given)
    if kind == "flux, single block":
        found, expected = found.split([TEXTS, TOKENS], 1), expected.split([TEXTS, TOKENS], 1)
        assert torch.equal(image, given["hidden_states"][:, TEXTS:])
    assert len(found) == len(expected) == 2
    for ours, theirs in zip(found, expected, strict=True):
        # the same float32 operations in another order
        assert torch.allclose(ours, theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", JOINT)
def test_text_queries_are_had_without_the_images(kind: str) -> None:
    site, given = joint_site(kind)
    asked = list[Tensor]()
    site.layer.to_q.register_forward_hook(lambda _, tokens, __: asked.append(tokens[0]))
    query, *rest = site.text_qkv(**given)
    assert sum(x.shape[1] for x in asked) == (TEXTS if kind == "flux, single block" else 0)
    for ours, theirs in zip((query, *rest), Site.text_qkv(site, **given), strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", JOINT)
def test_a_replacement_of_joint_attention_is_given_all_that_its_block_gives(kind: str) -> None:
    site, given = joint_site(kind)
    before = site.layer(**given)
    seen: list[dict[str, Any]] = []

    class Watching:
        def attention(self, site: Site, hidden_states: Tensor, **given: Any) -> Any:
            seen.append({"hidden_states": hidden_states, **given})
            return site.plain(hidden_states, **given)

    processor = site.layer.processor
    with site.replaced(Watching()):
        again = site.layer(**given)
    assert site.layer.processor is processor
    assert all(map(torch.equal, before, again))
    assert seen[0].keys() >= given.keys()
    assert all(seen[0][name] is value for name, value in given.items())


def test_a_site_without_text_returns_what_it_puts_out() -> None:
    site, x = site_of(), torch.randn(3, TOKENS, CHANNELS)
    assert not site.has_text
    assert site.image(x) is x
    assert site.joined(x, torch.empty(3, HEADS, 0, 4)) is x
