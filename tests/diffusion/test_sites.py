from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tokenflow.diffusion import Site, StableDiffusion
from tokenflow.diffusion.sites import DiffusersSite

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
    assert len(sites) == 16  # two in each of three encoder blocks, one in the middle, nine above
    assert set(sites) == set(expected)
    for name, site in sites.items():
        assert site.name == name
        assert site.layer is backbone.network.get_submodule(name)
        assert site.layer.to_k.in_features == (16 if cross else site.layer.to_q.in_features)
