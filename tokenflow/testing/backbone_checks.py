"""The checks of a backbone: its latents, its noise, and its attention are what the engine takes."""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from itertools import pairwise
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tokenflow.diffusion import Backbone, Conditioning, Schedule, Site, Trajectory
from tokenflow.diffusion.backbone import Role
from tokenflow.diffusion.schedule import PredictionType
from tokenflow.editors import Editor, Prompts
from tokenflow.engine import Settings, edit_latents
from tokenflow.engine.attention import AttentionSwitch
from tokenflow.engine.settings import ConsistencyName
from tokenflow.propagation import NNField, Window
from tokenflow.testing.checks import Check, FailedError, require, run_all, unchanged_state
from tokenflow.testing.state import backbone_state
from tokenflow.testing.tiny import tiny_clip

FRAMES, STEPS = 3, 2
PROMPTS = "a ball on sand", "red"
ROUNDING = 1e-3
"""float32 through a network, with sums in another order, as a share of the largest value."""


def check_backbone(backbone: Backbone) -> None:
    """Runs all checks of a backbone; raises `ConformanceError` at the first that fails."""
    run_all(backbone_checks(backbone))


def backbone_checks(backbone: Backbone) -> list[Check]:
    """All checks of a backbone, to be called one by one.

    It should be small, on the CPU and in float32: a tiny network with random weights is enough.
    """
    functions = (
        sizes_stated, latents_of_frames, schedule_of_noise, conditioning_per_prompt,
        output_like_latents, rows_independent, sites_named, sites_matched, sites_called,
        sites_make_up_the_attention, sites_restored, layers_named, equal_frames_as_one_alone,
        fingerprint_stable, global_state_unchanged,
    )  # fmt: skip
    return [Check(backbone, function) for function in functions]


def frames(backbone: Backbone) -> Float[Tensor, "n 3 height width"]:
    """Of the smallest size that is twice as wide as high."""
    return tiny_clip(FRAMES, backbone.multiple, 2 * backbone.multiple).frames[:]


def latent_size(backbone: Backbone) -> tuple[int, int]:
    """Height and width of `frames`' latents."""
    side = backbone.multiple // backbone.latent_scale
    return side, 2 * side


def noise(backbone: Backbone, count: int = FRAMES) -> Float[Tensor, "n c h w"]:
    """Standard normal latents of the frames' size, always the same, on the network's device."""
    generator = torch.Generator().manual_seed(3)
    shape = count, backbone.latent_channels, *latent_size(backbone)
    return torch.randn(shape, generator=generator).to(backbone.device)


def channels(backbone: Backbone, count: int) -> Float[Tensor, "n d h w"] | None:
    """What the network takes beside the latents, if anything, in 0..1 and always the same."""
    if backbone.further_channels is None:
        return None
    more = 1 if backbone.further_channels == "depth" else 1 + backbone.latent_channels
    generator = torch.Generator().manual_seed(4)
    return torch.rand(count, more, *latent_size(backbone), generator=generator)


def given(backbone: Backbone, rows: slice) -> dict[str, Tensor]:
    """The same as `predict` is given it."""
    every = channels(backbone, rows.stop)
    return {} if every is None else {"channels": every[rows].to(backbone.device)}


def schedule(backbone: Backbone, steps: int = STEPS) -> Schedule:
    return backbone.schedule(steps, latent_size(backbone))


def predicted(backbone: Backbone, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
    """The network's output for one prompt, at the second noise level of sampling."""
    t = schedule(backbone).timesteps[-1]
    conditioning = backbone.embed(PROMPTS[:1]).per_frame(len(x))
    return backbone.predict(x, t, conditioning, **given(backbone, slice(len(x))))


def require_near(found: Tensor, expected: Tensor, what: str, advice: str) -> None:
    """Raises `FailedError` where tensors differ by more than rounding."""
    same = found.shape == expected.shape
    difference = float((found - expected).abs().max()) if same else float("inf")
    bound = ROUNDING * max(1.0, float(expected.abs().max()))
    got = f"a difference of {difference:.4g}" if same else f"shape {tuple(found.shape)}"
    require(difference <= bound, what, got, advice)


def sizes_stated(backbone: Backbone) -> None:
    names = ("latent_channels", "latent_scale", "multiple", "size")
    for name in names:
        value = getattr(backbone, name)
        require(
            isinstance(value, int) and value > 0, f"{name} to be a number above 0", repr(value),
            "see the docstring of Backbone",
        )  # fmt: skip
    require(
        backbone.multiple % backbone.latent_scale == 0,
        "frames' sides to be whole numbers of latent pixels",
        f"multiple {backbone.multiple} and latent_scale {backbone.latent_scale}",
        "make multiple the pixels along one of the network's deepest tokens",
    )  # fmt: skip
    found = {parameter.device for parameter in backbone.network.parameters()}
    require(
        found <= {backbone.device}, f"the network on its device, {backbone.device}", found,
        "load all of it there",
    )  # fmt: skip


def latents_of_frames(backbone: Backbone) -> None:
    given = frames(backbone)
    latents = backbone.encode(given)
    expected = (FRAMES, backbone.latent_channels, *latent_size(backbone))
    require(
        (tuple(latents.shape), latents.dtype) == (expected, torch.float32),
        f"latents of shape {expected} in float32", f"{tuple(latents.shape)} in {latents.dtype}",
        "encode() must agree with latent_channels and latent_scale",
    )  # fmt: skip
    advice = "encode() takes the mean of what the encoder finds, of every frame on its own"
    require_near(backbone.encode(given[:1]), latents[:1], "the same latent of a frame", advice)
    decoded = backbone.decode(latents)
    require(
        (decoded.shape, decoded.dtype) == (given.shape, torch.float32)
        and bool(((decoded >= 0) & (decoded <= 1)).all()),
        f"frames of shape {tuple(given.shape)} in float32, from 0 to 1",
        f"{tuple(decoded.shape)} in {decoded.dtype}, from {float(decoded.min()):.3g} to "
        f"{float(decoded.max()):.3g}",
        "decode() leads back to what encode() is given",
    )  # fmt: skip


def schedule_of_noise(backbone: Backbone) -> None:
    for steps in (1, 4):
        found = schedule(backbone, steps)
        shares = [n / (s + n) for s, n in zip(found.signal, found.noise, strict=True)]
        require(
            len(found) == steps
            and all(a > b for a, b in pairwise(found.timesteps))
            and all(a > b for a, b in pairwise(shares)),
            f"{steps} timesteps and levels that fall from noise to the clean latent",
            f"timesteps {found.timesteps} with a share of noise of {shares}",
            "schedule(steps) gives the noisiest level first and the clean one last",
        )  # fmt: skip
        require(
            found.prediction in get_args(PredictionType) and found == schedule(backbone, steps),
            "the same schedule at each call", "another one", "keep nothing between calls",
        )  # fmt: skip
    sampling, finer = schedule(backbone, 2), schedule(backbone, 5)
    require(
        set(sampling.timesteps) <= set(sampling.refined(finer).timesteps),
        "sampling's levels among those of inversion", sampling.refined(finer).timesteps,
        "timesteps must tell noise levels apart",
    )  # fmt: skip


def conditioning_per_prompt(backbone: Backbone) -> None:
    both = backbone.embed(PROMPTS)
    require(
        isinstance(both, Conditioning) and len(both) == len(PROMPTS),
        f"a Conditioning with {len(PROMPTS)} rows", both, "embed() has a row for each prompt",
    )  # fmt: skip
    alone = backbone.embed(PROMPTS[1:])
    for name, rows in both.rows([1]).tensors.items():
        advice = "embed every prompt on its own, padded to one length"
        require_near(alone[name].float(), rows.float(), f"the same {name} of a prompt", advice)


def output_like_latents(backbone: Backbone) -> None:
    x = noise(backbone)
    before = x.clone()
    output = predicted(backbone, x)
    require(
        (output.shape, output.dtype, output.device) == (x.shape, torch.float32, backbone.device)
        and bool(output.isfinite().all()),
        f"finite output of shape {tuple(x.shape)} in float32 on {backbone.device}",
        f"{tuple(output.shape)} in {output.dtype} on {output.device}",
        "predict() takes latents of any size that is a multiple, whatever the network's dtype",
    )  # fmt: skip
    require(
        torch.equal(x, before) and torch.equal(predicted(backbone, x), output),
        "the same output at each call, and latents left as they were", "others",
        "the network must be in eval mode, and predict() must not write into what it is given",
    )  # fmt: skip


def rows_independent(backbone: Backbone) -> None:
    x, t = noise(backbone, 2), schedule(backbone).timesteps[-1]
    conditioning = backbone.embed(PROMPTS)
    both = backbone.predict(x, t, conditioning, **given(backbone, slice(2)))
    for row in range(2):
        here = slice(row, row + 1)
        alone = backbone.predict(
            x[here], t, conditioning.rows([row]), **given(backbone, here)
        )  # fmt: skip
        require_near(
            alone, both[row : row + 1], "a row's output not to depend on the batch's other rows",
            "each latent goes with the conditioning's row of its own",
        )  # fmt: skip


def sites_named(backbone: Backbone) -> None:
    sites, modules = backbone.sites(), dict(backbone.network.named_modules())
    require(
        len(sites) > 0, "at least one attention site", "none",
        "sites() has the layers in which a frame's tokens attend to each other",
    )  # fmt: skip
    wrong = [name for name, site in sites.items() if site.name != name or name not in modules]
    require(
        not wrong, "sites by their own names, which are those of modules", wrong,
        "name a site as network.named_modules() names its layer",
    )  # fmt: skip


def sites_matched(backbone: Backbone) -> None:
    matched, again = ([s.matched for s in backbone.sites().values()] for _ in range(2))
    require(
        all(isinstance(one, bool) for one in matched) and any(matched) and matched == again,
        "matched to be true or false of each site, alike in each call, and true of one or more",
        f"{matched} and {again}",
        "Site.matched says where tokens are propagated; it is true by default",
    )  # fmt: skip


@dataclasses.dataclass
class Rebuilt:
    """Attention of each frame by itself, from a site's parts; counts calls and tokens."""

    tokens: dict[str, int] = dataclasses.field(default_factory=dict)

    def __call__(self, site: Site, hidden_states: Tensor, *_: Any, **given: Any) -> Any:
        count = site.image(hidden_states, **given).shape[1]
        self.tokens[site.name] = count
        query, key, value = site.qkv(hidden_states, **given)
        image = scaled_dot_product_attention(query[:, :, :count], key, value, scale=site.scale)
        query, key, value = site.text_qkv(hidden_states, **given)
        text = scaled_dot_product_attention(query, key, value, scale=site.scale)
        return site.joined(site.output(image, **given), text, **given)


def rebuilt(backbone: Backbone) -> tuple[Tensor, dict[str, int]]:
    """The network's output by sites' parts, and how many image tokens each site saw."""
    switch, attention = AttentionSwitch(backbone.sites()), Rebuilt()
    switch.attention = attention
    with switch.installed():
        return predicted(backbone, noise(backbone)), attention.tokens


def sites_called(backbone: Backbone) -> None:
    _, seen = rebuilt(backbone)
    height, width = latent_size(backbone)
    window = Window((), (), torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2))
    for name in backbone.sites():
        require(
            name in seen, "every site's replacement called in a pass", f"{name} not called",
            "Site.replaced must put it in place of the layer's attention",
        )  # fmt: skip
        here = window.at_site(name, seen[name], (height, width))
        require(
            here.height * here.width == seen[name],
            f"as many image tokens as a smaller picture of {height} x {width} has",
            f"{seen[name]} at {name}",
            "Site.image gives the tokens of the frame alone, row by row",
        )  # fmt: skip


def sites_make_up_the_attention(backbone: Backbone) -> None:
    require_near(
        rebuilt(backbone)[0], predicted(backbone, noise(backbone)),
        "the layers' own output from their sites' qkv, output and joined",
        "norms, positions and scale belong into them; image tokens come first, then text",
    )  # fmt: skip


class Midway(Exception):  # noqa: N818 (no error)
    """Ends a block in which sites are replaced."""


def refused(site: Site, *_: Any, **__: Any) -> Any:
    """The attention of a site that should be restored by now."""
    raise FailedError(
        "layers restored after the block of Site.replaced", f"{site.name} still replaced",
        "restore the layer, also after an exception",
    )  # fmt: skip


def sites_restored(backbone: Backbone) -> None:
    before, output = backbone_state(backbone), predicted(backbone, noise(backbone))
    for interrupted in (False, True):
        switch = AttentionSwitch(backbone.sites())
        with suppress(Midway), switch.installed():
            replaced = predicted(backbone, noise(backbone))
            if interrupted:
                raise Midway
        switch.attention = refused
        require(
            torch.equal(replaced, output), "a replacement that calls Site.plain to change nothing",
            f"a difference of {float((replaced - output).abs().max()):.4g}",
            "Site.plain is the layer's own attention, with what it is given",
        )  # fmt: skip
        after = backbone_state(backbone)
        changed = [name for name, value in after.items() if before[name] != value]
        same = torch.equal(predicted(backbone, noise(backbone)), output)
        require(
            same and not changed, "the network after an edit to be what it was",
            f"other {' and '.join(changed) or 'output'}",
            "Site.replaced must restore the layer, also after an exception",
        )  # fmt: skip


def layers_named(backbone: Backbone) -> None:
    modules = dict(backbone.network.named_modules())
    for role in get_args(Role):
        named = list(backbone.layers(role))
        entered = [entry for layer in named for entry in backbone.entries(layer)]
        wrong = [name for name in [*named, *entered] if name not in modules]
        require(
            not wrong, f"modules of the network as layers and entries of role {role}", wrong,
            "take names from network.named_modules(); a role that no layer has is empty",
        )  # fmt: skip


def edited(backbone: Backbone, consistency: ConsistencyName) -> Float[Tensor, "n c h w"]:
    """Of a clip of equal frames, from equal noise."""
    noises, more = schedule(backbone), channels(backbone, 1)
    clean = backbone.encode(frames(backbone)[:1]).cpu().expand(FRAMES, -1, -1, -1)
    start = noise(backbone, 1).cpu().expand_as(clean)
    levels = torch.stack([noises.mix(clean, start, i) for i in range(STEPS)])
    source = Trajectory(
        noises.timesteps, levels, clean, levels[0], noises.signal[0], noises.noise[0]
    )  # fmt: skip
    return edit_latents(
        backbone, source, noises, Prompts(*PROMPTS), Editor(), NNField(),
        Settings(steps=STEPS, keyframe_every=2, consistency=consistency, guidance=2.0),
        channels=None if more is None else more.expand(FRAMES, -1, -1, -1),
    )  # fmt: skip


def equal_frames_as_one_alone(backbone: Backbone) -> None:
    alone = edited(backbone, "none")
    for way in get_args(ConsistencyName):
        require_near(
            edited(backbone, way), alone,
            f"equal frames to be edited as each alone where consistency is {way!r}",
            "all of a frame's tokens that others attend to must be in Site.qkv, text tokens too",
        )  # fmt: skip


def fingerprint_stable(backbone: Backbone) -> None:
    found = backbone.fingerprint
    predicted(backbone, noise(backbone))
    require(
        isinstance(found, str) and found != "" and backbone.fingerprint == found,
        "the same text as fingerprint at every time", f"{found!r} and {backbone.fingerprint!r}",
        "make it a digest of weights and configurations: inversions are found by it",
    )  # fmt: skip


def global_state_unchanged(backbone: Backbone) -> None:
    with unchanged_state():
        edited(backbone, "tokenflow")
