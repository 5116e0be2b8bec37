"""The network under an editor: what is changed in it, when, and that nothing remains."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from tokenflow.diffusion import Backbone, Conditioning, ModelError, Site, StableDiffusion
from tokenflow.editors import Batch, Editor, Injection, PnP, Prompts
from tokenflow.engine import Settings, edit_clip
from tokenflow.engine.attention import JointAttention, plain
from tokenflow.engine.network import EditedNetwork
from tokenflow.errors import PluginError
from tokenflow.propagation import NNField
from tokenflow.video import Clip

PROMPTS = Prompts("a blue ball", "a cube", "a ball")
STEPS = 5
FEED_FORWARD = "up_blocks.3.attentions.0.transformer_blocks.0.ff"
BRANCHES = ("source", "negative", "prompt")


def output(unet: UNet2DConditionModel) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, 4, 8, 8, generator=generator)
    text = torch.randn(3, 5, 16, generator=generator)
    with torch.no_grad():
        return unet(x, 500, encoder_hidden_states=text).sample


@contextmanager
def unchanged(unet: UNet2DConditionModel) -> Iterator[None]:
    """Fails unless the UNet comes out of the block exactly as it went in."""
    before, processors = output(unet), dict(unet.attn_processors)
    yield
    after = unet.attn_processors
    assert list(after) == list(processors)
    assert all(after[site] is processors[site] for site in after)
    for module in unet.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "forward" not in vars(module)
    assert torch.equal(output(unet), before)


class Plain(Editor):
    """Changes nothing."""

    interface = 2


def a_batch(network: EditedNetwork, step: int = 0, frames: Sequence[int] = (3, 1)) -> Batch:
    """A pass of random latents."""
    generator = torch.Generator().manual_seed(step)
    branches = len(network.branches)
    x = torch.randn(branches, len(frames), 4, 8, 8, generator=generator)
    told, t = network.prompts.per_frame(len(frames)), 901 - 100 * step
    return Batch(network.branches, tuple(frames), x, told, t, step, STEPS)


def edit(model: Backbone, clip: Clip, editor: Editor, **settings: Any) -> Tensor:
    """The latents of an edit in windows of four frames."""
    chosen = Settings(**{"steps": 2, "keyframe_every": 4, "batch": 5, **settings})
    return edit_clip(model, clip, PROMPTS, editor, NNField(), chosen).latents


def test_a_pass_is_branches_by_frames(backbone: Backbone) -> None:
    network = EditedNetwork(backbone, Plain(), PROMPTS)
    assert (network.branches, network.source_prompt) == (BRANCHES, "a ball")
    batch = a_batch(network)
    with torch.no_grad(), network.installed():
        found = network.run(batch)
        for branch, prompt in enumerate(("a ball", "a cube", "a blue ball")):
            text = backbone.embed([prompt])
            for place in range(2):
                alone = backbone.predict(batch.latents[branch, place][None], batch.t, text)
                # float32 sums in another order
                assert torch.allclose(found[branch, place], alone[0], rtol=0, atol=1e-5)


# begin, end, steps, and the steps at which an injection is on
ON = [
    *((0.0, 1.0, 4, [0, 1, 2, 3]), (0.0, 0.0, 7, []), (0.5, 0.5, 4, []), (1.0, 1.0, 4, [])),
    *((0.0, 0.5, 1, []), (0.0, 1.0, 1, [0]), (0.0, 0.5, 3, [0]), (0.0, 0.99, 3, [0, 1])),
    *((0.3, 0.7, 10, [3, 4, 5, 6]), (0.5, 1.0, 7, [3, 4, 5, 6]), (0.0, 0.8, 7, [0, 1, 2, 3, 4])),
]  # fmt: skip


@pytest.mark.parametrize(("begin", "end", "steps", "expected"), ON)
def test_an_injection_is_on_from_begin_to_before_end(
    begin: float, end: float, steps: int, expected: list[int]
) -> None:
    injection = Injection("layer", lambda edited, source, batch: edited, begin, end)
    assert [i for i in range(steps) if injection.active(i, steps)] == expected
    # two that share a border follow each other
    after = Injection("layer", injection.function, end, 1.0)
    assert not any(injection.active(i, steps) and after.active(i, steps) for i in range(steps))


Given = tuple[Tensor, Tensor, Batch]


class Injecting(Editor):
    """Injects at one layer what a function says, and keeps what that is given."""

    interface = 2

    def __init__(
        self,
        layer: str,
        function: Callable[[Tensor, Tensor], Any] = lambda edited, source: edited,
        begin: float = 0.0,
        end: float = 1.0,
    ) -> None:
        self.layer, self.function, self.begin, self.end = layer, function, begin, end
        self.given: list[Given] = []

    def injections(self, model: Backbone) -> list[Injection]:
        return [Injection(self.layer, self.inject, self.begin, self.end)]

    def inject(self, edited: Tensor, source: Tensor, batch: Batch) -> Tensor:
        self.given.append((edited, source, batch))
        return self.function(edited, source)


def test_an_injection_is_given_the_layers_output_and_the_pass(backbone: StableDiffusion) -> None:
    layer = backbone.layers("structure")[0]
    editor = Injecting(layer, lambda edited, source: edited + source, begin=0.2, end=0.6)
    network, own = EditedNetwork(backbone, editor, PROMPTS), []
    module = backbone.network.get_submodule(layer)
    with torch.no_grad(), ExitStack() as stack:
        keep = module.register_forward_hook(lambda *args: own.append(args[2]))
        stack.callback(keep.remove)
        stack.enter_context(network.installed())
        after = module.register_forward_hook(lambda *args: own.append(args[2]))
        stack.callback(after.remove)
        for step in range(STEPS):
            network.run(a_batch(network, step))
    assert [batch.step for _, _, batch in editor.given] == [1, 2]
    for (edited, source, batch), step in zip(editor.given, (1, 2), strict=True):
        raw, changed = (x.unflatten(0, (3, 2)) for x in own[2 * step : 2 * step + 2])
        assert torch.equal(source, raw[0])
        assert torch.equal(edited, raw[1:])
        assert torch.equal(changed[0], raw[0])
        assert torch.equal(changed[1:], raw[1:] + raw[0])
        assert (batch.frames, batch.branches) == ((3, 1), BRANCHES)
        assert torch.equal(batch.latents, a_batch(network, step).latents)
    for step in (0, 3, 4):
        assert torch.equal(*own[2 * step : 2 * step + 2])


ONCE = [(0, 4, 8), (1, 2, 3, 5, 6), (7,)]
AGAIN = [(0, 4, 8), (0, 1, 2, 3, 4), (5, 6, 7, 8)]


@pytest.mark.parametrize(
    ("neighbours", "promised", "passes"),
    [("bracketing", True, ONCE), ("bracketing", False, AGAIN), ("previous", True, AGAIN)],
)
def test_an_injection_sees_every_pass_of_an_edit(
    backbone: Backbone,
    clip: Clip,
    monkeypatch: pytest.MonkeyPatch,
    neighbours: Any,
    promised: bool,
    passes: list[tuple[int, ...]],
) -> None:
    """Keyframes take part in one pass, where a second one would come to the same."""
    monkeypatch.setattr(NNField, "identity_at_keyframes", promised)
    editor = Injecting(backbone.layers("structure")[0])
    edit(backbone, clip, editor, keyframes="first", neighbours=neighbours)
    batches = [batch for _, _, batch in editor.given]
    assert [batch.frames for batch in batches] == 2 * passes
    assert [batch.keyframes for batch in batches] == 2 * [True, False, False]
    assert [batch.step for batch in batches] == [0, 0, 0, 1, 1, 1]
    assert {(batch.steps, batch.branches, batch.inversion) for batch in batches} == {
        (2, BRANCHES, False)
    }
    for edited, source, batch in editor.given:
        assert edited.shape[:2] == (2, len(batch.frames))
        assert source.shape == edited.shape[1:]


@pytest.mark.parametrize("consistency", ["joint", "none"])
def test_keyframes_are_what_is_denoised_jointly(
    backbone: Backbone, clip: Clip, consistency: Any
) -> None:
    editor = Injecting(backbone.layers("structure")[0])
    edit(backbone, clip, editor, consistency=consistency, steps=1)
    assert {batch.keyframes for _, _, batch in editor.given} == {consistency == "joint"}


def test_projections_are_injected_into_keyframes_alone(backbone: Backbone, clip: Clip) -> None:
    """A propagated pass takes the output of self-attention from keyframes."""
    editor = Injecting(backbone.layers("queries")[0])
    edit(backbone, clip, editor, steps=1)
    assert [batch.keyframes for _, _, batch in editor.given] == [True]


def test_the_edited_branches_take_the_sources_output(backbone: StableDiffusion) -> None:
    names = {
        "features": "up_blocks.1.resnets.0.conv2",
        "queries": "up_blocks.3.attentions.1.transformer_blocks.0.attn1.to_q",
        "keys": "up_blocks.1.attentions.1.transformer_blocks.0.attn1.to_k",
        "values": "up_blocks.1.attentions.1.transformer_blocks.0.attn1.to_v",
        "before": "up_blocks.0.resnets.1.conv2",
    }
    seen: dict[str, Tensor] = {}
    network = EditedNetwork(backbone, PnP(), PROMPTS)
    with network.installed(), torch.no_grad(), ExitStack() as hooks:
        for role, name in names.items():
            # later than the editor's hooks, so that it is given what they return
            hook = backbone.network.get_submodule(name).register_forward_hook(
                lambda m, i, out, role=role: seen.update({role: out})
            )
            hooks.enter_context(hook)
        network.run(a_batch(network))

    def equal(role: str) -> bool:
        source, *edited = seen[role].chunk(3)
        return all(torch.equal(branch, source) for branch in edited)

    assert [role for role in names if equal(role)] == ["features", "queries", "keys"]


def test_nothing_touches_the_source_branch(backbone: Backbone) -> None:
    network = EditedNetwork(backbone, PnP(), PROMPTS)
    batch = a_batch(network)
    with torch.no_grad():
        before = network.run(batch)
        with network.installed():
            edited = network.run(batch, JointAttention(3))
    assert not torch.allclose(edited[1:], before[1:], rtol=0, atol=1e-3)
    # two orders of the same float32 operations, through the network
    assert torch.allclose(edited[0], before[0], rtol=0, atol=1e-5)


def test_a_layer_that_puts_out_no_tensor(backbone: Backbone, clip: Clip) -> None:
    with pytest.raises(PluginError, match=r"another than down_blocks\.0, a CrossAttnDownBlock2D"):
        edit(backbone, clip, Injecting("down_blocks.0"), steps=1)


@pytest.mark.parametrize("layer", [FEED_FORWARD, f"{FEED_FORWARD}.net.2"])
def test_a_layer_that_takes_image_by_image_is_injected_into(
    backbone: StableDiffusion, layer: str
) -> None:
    block = FEED_FORWARD.removesuffix(".ff")
    assert block in backbone.chunked
    network = EditedNetwork(backbone, Injecting(layer), PROMPTS)
    batches: list[int] = []
    module = backbone.unet.get_submodule(FEED_FORWARD)
    with module.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0]))):
        with network.installed(), torch.no_grad():
            network.run(a_batch(network))
        output(backbone.unet)
    assert batches == [6, 1, 1, 1]


@pytest.mark.parametrize("layer", [FEED_FORWARD, f"{FEED_FORWARD}.net.2"])
def test_a_layer_that_is_compiled(
    backbone: StableDiffusion, clip: Clip, monkeypatch: pytest.MonkeyPatch, layer: str
) -> None:
    monkeypatch.setattr(backbone, "compiled", frozenset({FEED_FORWARD.removesuffix(".ff")}))
    with unchanged(backbone.unet), pytest.raises(ModelError, match=f"{layer} is compiled; an edi"):
        edit(backbone, clip, Injecting(layer))


class Crossing(Editor):
    """Replaces cross-attention at some sites by what a function makes of their own output."""

    interface = 2

    def __init__(self, sites: slice, function: Callable[[Tensor], Tensor]) -> None:
        self.sites, self.function = sites, function
        self.calls: list[tuple[Batch, str, Tensor, Tensor]] = []

    def cross_attention(self, model: Backbone) -> Mapping[str, Any]:
        return dict.fromkeys(list(model.cross_attention())[self.sites], self.process)

    def process(
        self, batch: Batch, site: Site, hidden_states: Tensor, encoder_hidden_states: Tensor,
        **given: Any,
    ) -> Tensor:  # fmt: skip
        self.calls.append((batch, site.name, hidden_states, encoder_hidden_states))
        plain = site.plain(hidden_states, encoder_hidden_states=encoder_hidden_states, **given)
        return self.function(plain)


def test_cross_attention_is_replaced_in_every_pass(backbone: StableDiffusion, clip: Clip) -> None:
    editor = Crossing(slice(3), torch.zeros_like)
    with unchanged(backbone.unet):
        changed = edit(backbone, clip, editor, keyframes="first", steps=1)
    sites = list(backbone.cross_attention())[:3]
    expected = [(frames, site) for frames in ONCE for site in sites]
    assert [(batch.frames, site) for batch, site, _, _ in editor.calls] == expected
    for batch, _, x, text in editor.calls:
        assert batch.branches == BRANCHES
        assert len(x) == len(text) == 3 * len(batch.frames)
        assert torch.equal(text, batch.conditioning["embeddings"])
    assert not torch.allclose(changed, edit(backbone, clip, Plain(), steps=1), atol=1e-3)


def test_cross_attention_that_is_the_sites_own_changes_nothing(
    backbone: Backbone, clip: Clip
) -> None:
    editor = Crossing(slice(None), lambda plain: plain)
    assert torch.equal(edit(backbone, clip, editor), edit(backbone, clip, Plain()))
    assert len(editor.calls) == 2 * 3 * len(backbone.cross_attention())


def test_cross_attention_at_a_site_that_is_none(backbone: Backbone, clip: Clip) -> None:
    class Lost(Plain):
        def cross_attention(self, model: Backbone) -> Mapping[str, Any]:
            return {"up.nowhere": lambda *_: None}

    with pytest.raises(PluginError, match=r"got \['up.nowhere'\].* choose from down_blocks"):
        edit(backbone, clip, Lost())


class Weighted(Editor):
    """Scales the embeddings by a number for each frame, step and branch."""

    interface = 2

    def __init__(self) -> None:
        self.batches: list[Batch] = []

    def conditioning(self, batch: Batch) -> Conditioning:
        self.batches.append(batch)
        weights = torch.tensor([weight(batch, branch, frame) for branch, frame in pairs(batch)])
        return batch.conditioning.map(lambda rows: rows * weights.view(-1, 1, 1))


def pairs(batch: Batch) -> list[tuple[str, int]]:
    """Branch and frame of every row of a batch."""
    return [(branch, frame) for branch in batch.branches for frame in batch.frames]


def weight(batch: Batch, branch: str, frame: int) -> float:
    return 1 + 0.1 * frame + batch.step + 10 * BRANCHES.index(branch)


def test_embeddings_may_differ_for_every_frame_and_step(
    backbone: StableDiffusion, clip: Clip
) -> None:
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: Any, options: dict[str, Any]) -> None:
        seen.append(options["encoder_hidden_states"])

    editor = Weighted()
    with backbone.network.register_forward_pre_hook(keep, with_kwargs=True):
        edit(backbone, clip, editor, keyframes="first")
    embeddings = backbone.embed(["a ball", "a cube", "a blue ball"])["embeddings"]
    texts = dict(zip(BRANCHES, embeddings, strict=True))
    assert len(seen) == len(editor.batches) == 2 * 2 + 2 * 3  # of inversion and sampling
    for text, batch in zip(seen, editor.batches, strict=True):
        rows = [weight(batch, branch, frame) * texts[branch] for branch, frame in pairs(batch)]
        assert torch.equal(text, torch.stack(rows))
    inversion = [batch for batch in editor.batches if batch.inversion]
    assert [(batch.branches, batch.step) for batch in inversion] == [
        (("source",), 1), (("source",), 0)
    ] * 2  # fmt: skip
    assert editor.conditions_source
    assert not Plain().conditions_source


def test_an_edit_installs_processors_once_and_switches_between_passes(
    backbone: StableDiffusion, clip: Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a compiled network stays compiled."""
    installed: list[Attention] = []
    original, register = Attention.set_processor, nn.Module.register_forward_hook
    hooks: list[nn.Module] = []

    def count(layer: Attention, processor: Any) -> None:
        installed.append(layer)
        original(layer, processor)

    def count_hook(module: nn.Module, *args: Any, **options: Any) -> Any:
        hooks.append(module)
        return register(module, *args, **options)

    monkeypatch.setattr(Attention, "set_processor", count)
    monkeypatch.setattr(nn.Module, "register_forward_hook", count_hook)
    for steps in (1, 3):
        installed.clear()
        hooks.clear()
        edit(backbone, clip, PnP(), steps=steps)
        sites = [site.layer for site in backbone.sites().values()]
        # put in at the beginning, and their own put back at the end
        assert len(installed) == 2 * len(sites)
        assert {id(layer) for layer in installed} == {id(layer) for layer in sites}
        assert len(hooks) == len(PnP().injections(backbone))


def raising(*_: Any, **__: Any) -> Any:
    raise RuntimeError("midway")


@pytest.mark.parametrize("where", ["block", "injection", "attention", "cross-attention"])
def test_nothing_remains_after_an_exception(backbone: StableDiffusion, where: str) -> None:
    class Broken(PnP):
        def injections(self, model: Backbone) -> list[Injection]:
            own, last = super().injections(model), model.layers("structure")[-1]
            return [*own, Injection(last, raising)] if where == "injection" else [*own]

        def cross_attention(self, model: Backbone) -> Mapping[str, Any]:
            last = list(model.cross_attention())[-1]
            return {last: raising} if where == "cross-attention" else {}

    network = EditedNetwork(backbone, Broken(), PROMPTS)

    def run() -> None:
        with torch.no_grad(), network.installed():
            network.run(a_batch(network), raising if where == "attention" else JointAttention(3))
            if where == "block":
                raising()

    with unchanged(backbone.unet), pytest.raises((RuntimeError, PluginError), match="midway"):
        run()
    # and the next pass is as if there had been none
    assert network.running is None
    network.editor.editor = Plain()
    with torch.no_grad(), network.installed():
        found = network.run(a_batch(network))
        assert torch.equal(found, EditedNetwork(backbone, Plain(), PROMPTS).run(a_batch(network)))


def test_nothing_remains_of_injections_that_fail_to_install(backbone: StableDiffusion) -> None:
    class Half(PnP):
        def injections(self, model: Backbone) -> Iterator[Injection]:  # type: ignore[override]
            yield from super().injections(model)
            raise RuntimeError("midway")

    network = EditedNetwork(backbone, Half(), PROMPTS)
    with (
        unchanged(backbone.unet),
        pytest.raises(PluginError, match=r"Half .* failed in injections: RuntimeError: midway"),
        network.installed(),
    ):
        pass


class RaisingPnP(PnP):
    """Raises in its `calls`-th pass of sampling."""

    def __init__(self, calls: int) -> None:
        super().__init__(attention=1.0, features=1.0)
        self.calls = calls

    def model_inputs(self, batch: Batch) -> dict[str, Any]:
        self.calls -= not batch.inversion
        return {} if self.calls else raising()


@pytest.mark.parametrize(
    ("consistency", "calls"), [("tokenflow", 4), ("tokenflow", 6), ("joint", 2), ("none", 3)]
)
def test_nothing_remains_after_a_clip_that_fails(
    backbone: StableDiffusion, clip: Clip, consistency: Any, calls: int
) -> None:
    # in the second step: tokenflow makes three passes a step, the keyframes' and two windows'
    with unchanged(backbone.unet), pytest.raises(PluginError, match=r"RaisingPnP .*midway"):
        edit(backbone, clip, RaisingPnP(calls), consistency=consistency)


def test_nothing_remains_after_a_clip(backbone: StableDiffusion, clip: Clip) -> None:
    with unchanged(backbone.unet):
        edit(backbone, clip, PnP())


class Replacing(Editor):
    """Takes the source's output at some layers: by a function, or as the engine does it."""

    interface = 2

    def __init__(self, layers: Sequence[str], named: bool = False) -> None:
        self.layers, self.function = layers, taken if named else None

    def injections(self, model: Backbone) -> list[Injection]:
        return [Injection(layer, self.function, end=0.5) for layer in self.layers]


def taken(edited: Tensor, source: Tensor, batch: Batch) -> Tensor:
    return source.expand_as(edited)


def rows_of(model: Backbone, editor: Editor, attention: Any, step: int) -> tuple[dict, Tensor]:
    """How many of a batch's rows go through each convolution and linear layer in a pass."""
    network, rows = EditedNetwork(model, editor, PROMPTS), Counter[str]()
    with torch.no_grad(), ExitStack() as stack:
        for name, module in model.network.named_modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                count = lambda _, given, __, name=name: rows.update({name: len(given[0])})  # noqa: E731
                stack.callback(module.register_forward_hook(count).remove)
        stack.enter_context(network.installed())
        return rows, network.run(a_batch(network, step), attention)


def test_edited_branches_do_not_compute_what_the_source_replaces(backbone: Backbone) -> None:
    features, queries = backbone.layers("structure")[0], backbone.layers("queries")[0]
    keys, values = backbone.layers("keys")[0], backbone.layers("values")[0]
    layers = [features, queries, keys]
    block = features.removesuffix("conv2")
    source = {features, block + "conv1", block + "time_emb_proj", queries, keys}
    attention = JointAttention(len(BRANCHES))
    rows, found = rows_of(backbone, Replacing(layers), attention, step=0)
    assert {name for name, count in rows.items() if count == 2} == source
    assert rows[values] == rows[block + "conv_shortcut"] == 6
    every, expected = rows_of(backbone, Replacing(layers, named=True), attention, step=0)
    assert set(every.values()) == {6}
    # float32 sums of other batches
    assert torch.allclose(found, expected, rtol=0, atol=1e-5)
    later, _ = rows_of(backbone, Replacing(layers), attention, step=4)
    assert set(later.values()) == {6}


@pytest.mark.parametrize("role", ["queries", "keys", "values"])
def test_each_projection_may_be_the_sources_alone(backbone: Backbone, role: Any) -> None:
    layers = backbone.layers(role)[:2]
    for attention in (JointAttention(len(BRANCHES)), plain):
        rows, found = rows_of(backbone, Replacing(layers), attention, step=0)
        assert {name for name, count in rows.items() if count == 2} == set(layers)
        _, expected = rows_of(backbone, Replacing(layers, named=True), attention, step=0)
        assert torch.allclose(found, expected, rtol=0, atol=1e-5)


def test_what_another_injection_sees_is_computed_for_all(backbone: Backbone) -> None:
    layer = backbone.layers("structure")[0]
    editor, other = Replacing([layer]), Injecting(layer.removesuffix("2") + "1")
    both = [*editor.injections(backbone), *other.injections(backbone)]
    editor.injections = lambda model: both  # type: ignore[method-assign]
    rows, _ = rows_of(backbone, editor, plain, step=0)
    assert set(rows.values()) == {6}
    assert other.given[0][0].shape[:2] == (2, 2)
