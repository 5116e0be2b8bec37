"""Joint and propagated attention, for any site, and the switch between them.

The network's batch is always branches × frames, the source branch first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from tokenflow.diffusion import Site
from tokenflow.diffusion.sites import Attention
from tokenflow.engine.checked import blamed, named, require_interface
from tokenflow.engine.source_cache import SourceFeatures
from tokenflow.propagation import (
    ClipFlow,
    Correspondence,
    Propagation,
    Window,
    check_correspondence,
)


def plain(site: Site, hidden_states: Tensor, *args: Any, **given: Any) -> Any:
    """Every frame on its own: the network's attention as it is."""
    return site.plain(hidden_states, *args, **given)


class AttentionSwitch:
    """Processors of all sites, installed once per edit; `attention` is switched between passes."""

    def __init__(self, sites: Mapping[str, Site]) -> None:
        self.sites = sites
        self.attention: Attention = plain

    @contextmanager
    def installed(self) -> Iterator[None]:
        """A block in which the sites attend as the switch says; afterwards as before."""
        with ExitStack() as stack:
            for site in self.sites.values():
                stack.enter_context(site.replaced(self))
            yield


@dataclass
class Bank:
    """What the joint pass of one step leaves at every matched site, for the windows that use it.

    `source` holds each matched site's source tokens, (keyframes, tokens, channels), `outputs` the
    attention's output in all branches, (branches, keyframes, tokens, channels), of the keyframes
    that this rank's windows need. Of a sequence with text, the tokens are the image's.
    """

    source: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)

    def evict(self) -> None:
        """Frees all of it."""
        self.source.clear()
        self.outputs.clear()


WIDEST = 256
"""Width of a head up to which PyTorch's fused kernels attend."""


def attend(query: Tensor, key: Tensor, values: Tensor, scale: float | None) -> Tensor:
    """Attention of several values, (values, batch, heads, tokens, width), by one attention map.

    The values stand beside each other in one head, whose further width is 0 in query and key, as
    the fused kernels take one width.
    """
    count, width = len(values), query.shape[-1]
    scale = width**-0.5 if scale is None else scale
    if count * width > WIDEST:
        each = [scaled_dot_product_attention(query, key, value, scale=scale) for value in values]
        return torch.stack(each)
    query, key = (pad(x, (0, (count - 1) * width)) for x in (query, key))
    beside = rearrange(values, "n b h s d -> b h s (n d)")
    out = scaled_dot_product_attention(query, key, beside, scale=scale)
    return rearrange(out, "b h s (n d) -> n b h s d", n=count)


class JointAttention:
    """Edited branches attend to all keyframes at once (equation 3), the source to its own frame.

    With `joint_source` the source's branch attends as the edited ones do.

    Where they have the source's queries and keys, they share one attention map. A batch without the
    source's branch takes these from cached tokens. Where a site's sequence holds text, all
    keyframes' text tokens take part as well: frames that are equal then attend as one alone, to
    which no text would be lost in the image tokens of the others.

    Where the source is the only branch, as it is recorded in inversion, its attention stays as it
    is, and the bank has source tokens only.

    Args:
        branches: Of the pass, the source's among them.
        bank: Where to leave source tokens and outputs, if anywhere.
        all_gather: Of this rank's keyframes' keys and values: those of all keyframes, in order.
        exchange_halo: Of this rank's keyframes' tokens and outputs: those that the bank keeps.
        features: The source's, of the step.
        frames: The batch's, by position in the clip, for `features`.
        joint_source: As `Editor.joint_source`.
    """

    def __init__(
        self,
        branches: int,
        bank: Bank | None = None,
        all_gather: Callable[[Tensor], Tensor] = lambda own: own,
        exchange_halo: Callable[[Tensor], Tensor] = lambda own: own,
        features: SourceFeatures | None = None,
        frames: Sequence[int] = (),
        joint_source: bool = False,
    ) -> None:
        self.edited, self.bank, self.joint_source = branches - 1, bank, joint_source
        self.all_gather, self.exchange_halo = all_gather, exchange_halo
        self.features, self.positions = features or SourceFeatures(), frames

    def __call__(self, site: Site, hidden_states: Tensor, *args: Any, **given: Any) -> Any:
        features, tokens = self.features, f"tokens/{site.name}"
        image = site.image(hidden_states, **given)
        if not self.edited:
            if self.bank is not None and site.matched:
                self.bank.source[site.name] = self.exchange_halo(image)
            return plain(site, hidden_states, *args, **given)
        alone = features.cached  # the edited branches, without the source's
        frames = len(hidden_states) // (self.edited + (not alone))
        seen, attended = hidden_states, list[Tensor]()
        if features.has(tokens):
            seen = torch.cat([features.take(tokens, self.positions, seen), seen])
        # injected projections are of the source's rows alone, which come first
        q, k, v = (x.unflatten(0, (-1, frames)) for x in site.qkv(seen, **given))
        joint = self.edited + self.joint_source
        if not alone and not self.joint_source:
            own = scaled_dot_product_attention(q[0], k[0], v[0], scale=site.scale)
            attended.append(own)
        q, k, v = (x[-joint:] for x in (q, k, v))
        v, maps = v.expand(joint, *v.shape[1:]), max(len(q), len(k))
        q, k = (x.expand(maps, *x.shape[1:]) for x in (q, k))
        edited = self.all_gather(rearrange([*k, *v], "n f h s d -> f n h s d"))
        # the frames are folded into the sequence: four dimensions keep the fused kernels
        folded = rearrange(edited, "f n h s d -> n 1 h (f s) d")
        keys, values = folded[:maps], folded[maps:].unflatten(0, (maps, -1))
        for query, key, value in zip(q, keys, values, strict=True):
            query = rearrange(query, "f h s d -> 1 h (f s) d")
            out = attend(query, key, value, site.scale)
            attended.append(rearrange(out, "n 1 h (f s) d -> (n f) h s d", f=frames))
        image_values, text_values = torch.cat(attended).tensor_split([image.shape[1]], dim=2)
        output = site.output(image_values, **given)
        if self.bank is not None and site.matched:
            left = rearrange(output, "(b f) s c -> f b s c", f=frames)
            if alone:
                self.bank.outputs[site.name] = self.exchange_halo(left).transpose(0, 1)
            else:
                left = torch.cat([image[:frames, None], left], dim=1)
                source, outputs = self.exchange_halo(left).split([1, left.shape[1] - 1], dim=1)
                self.bank.source[site.name] = source[:, 0]
                self.bank.outputs[site.name] = outputs.transpose(0, 1)
        return site.joined(output, text_values, **given)


Look = Callable[[Tensor, Window, Correspondence], None]
"""Called with a window's source tokens, the window at its site, and the correspondence found.

Where it has a method `wants(step)`, only at the steps for which that is true.
"""


class Matcher:
    """A kernel with the optical flow that it needs; its answers are checked in the first step.

    Args:
        kernel: What finds correspondences.
        size: A latent's height and width.
        flow: The clip's optical flow, for a kernel that needs it.
        look: Is shown all correspondences.
    """

    def __init__(
        self,
        kernel: Propagation,
        size: tuple[int, int],
        flow: ClipFlow | None = None,
        look: Look | None = None,
    ) -> None:
        require_interface(kernel)
        self.kernel, self.size, self.flow, self.look = kernel, size, flow, look
        self.name = named(kernel)
        self.first: int | None = None

    def wanted(self, step: int) -> bool:
        """Whether a step's correspondences are to be shown."""
        wants: Callable[[int], bool] | None = getattr(self.look, "wants", None)
        return self.look is not None and (wants is None or wants(step))

    def at_site(self, window: Window, site: str, keys: Tensor) -> Window:
        """The window at a site, with the motion between its frames and their neighbours."""
        window = window.at_site(site, keys.shape[1], self.size)
        if self.flow is None:
            return window
        with blamed(self.flow.flow, "motion"):
            return dataclasses.replace(window, motion=self.flow.motion(window, keys.device))

    def inspect(self, found: Correspondence, source: Tensor, keys: Tensor, window: Window) -> None:
        """Checks an answer, where that need not wait for the accelerator again and again."""
        self.first = window.step if self.first is None else self.first
        if window.step == self.first:
            check_correspondence(found, source, keys, f"{self.name} at {window.site}")
        if self.look is not None and self.wanted(window.step):
            self.look(source, window, found)


class PropagatedAttention:
    """No attention: every token takes the keyframes' outputs at its correspondence (equation 6).

    Text tokens in a site's sequence have no such correspondence: they attend to their own frame's
    tokens, as they do without tokenflow. So do all tokens of a site that is not `matched`, and of
    the source where it is the only branch, as it is recorded in inversion.

    Args:
        branches: Of the pass, the source's among them.
        bank: Of the step's joint pass.
        matcher: What finds correspondences.
        window: The frames of the pass and their neighbouring keyframes.
        used: Which keyframes of the bank these are, in a row.
        features: The source's, of the step.
        first: The number of the bank's first keyframe in the clip, for `features`.
    """

    def __init__(
        self,
        branches: int,
        bank: Bank,
        matcher: Matcher,
        window: Window,
        used: list[int],
        features: SourceFeatures | None = None,
        first: int = 0,
    ) -> None:
        self.edited, self.bank, self.matcher = branches - 1, bank, matcher
        self.window, self.used, self.first = window, slice(used[0], used[-1] + 1), first
        self.features = features or SourceFeatures()

    def __call__(self, site: Site, hidden_states: Tensor, *args: Any, **given: Any) -> Any:
        if not site.matched:
            return plain(site, hidden_states, *args, **given)
        features, frames, used = self.features, self.window.frames, self.used
        image = site.image(hidden_states, **given)
        first = (self.first + used.start) * image.shape[1]
        if features.cached:
            found = features.correspondence(site.name, frames, first, image)
        else:
            source = image[: len(frames)]
            keys = self.bank.source[site.name][used]
            window = self.matcher.at_site(self.window, site.name, keys)
            with blamed(self.matcher.kernel, "correspond"):
                found = self.matcher.kernel.correspond(source, keys, window)
            self.matcher.inspect(found, source, keys, window)
            features.keep_correspondence(site.name, frames, found, first)
        if not self.edited:
            return plain(site, hidden_states, *args, **given)
        outputs = self.bank.outputs[site.name][:, used]
        with blamed(self.matcher.kernel, "gather"):
            output = found.gather(outputs).flatten(0, 1)
        if not site.has_text:
            return output
        text, key, value = site.text_qkv(hidden_states, **given)
        attended = scaled_dot_product_attention(text, key, value, scale=site.scale)
        return site.joined(output, attended, **given)
