"""Joint and propagated attention, for any site, and the switch between them.

The network's batch is always branches × frames, the source branch first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from tokenflow.diffusion import Site
from tokenflow.diffusion.sites import Attention
from tokenflow.engine.checked import blamed, named, require_interface
from tokenflow.propagation import (
    ClipFlow,
    Correspondence,
    Propagation,
    Window,
    check_correspondence,
)


def plain(site: Site, hidden_states: Tensor, *args: Any, **given: Any) -> Tensor:
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
    """What the joint pass of one step leaves at every site, for the windows that use it.

    `source` holds each site's source tokens, (keyframes, tokens, channels), and `outputs` the
    attention's output in all branches, (branches, keyframes, tokens, channels), of the keyframes
    that this rank's windows need.
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

    Where they have the source's queries and keys, they share one attention map.

    Args:
        branches: Of the network's batch.
        bank: Where to leave source tokens and outputs, if anywhere.
        all_gather: Of this rank's keyframes' keys and values: those of all keyframes, in order.
        exchange_halo: Of this rank's keyframes' tokens and outputs: those that the bank keeps.
    """

    def __init__(
        self,
        branches: int,
        bank: Bank | None = None,
        all_gather: Callable[[Tensor], Tensor] = lambda own: own,
        exchange_halo: Callable[[Tensor], Tensor] = lambda own: own,
    ) -> None:
        self.branches, self.bank = branches, bank
        self.all_gather, self.exchange_halo = all_gather, exchange_halo

    def __call__(
        self, site: Site, hidden_states: Tensor, *_: Any, **given: Any
    ) -> Float[Tensor, "batch tokens channels"]:
        b = self.branches
        frames = len(hidden_states) // b
        # injected projections are of the source's rows alone
        q, k, v = (x.unflatten(0, (-1, frames)) for x in site.qkv(hidden_states, **given))
        v = v.expand(b, *v.shape[1:])
        attended = [scaled_dot_product_attention(q[0], k[0], v[0], scale=site.scale)]
        maps = max(len(q), len(k)) - 1 or 1
        q, k = (x[-maps:].expand(maps, *x.shape[1:]) for x in (q, k))
        edited = self.all_gather(rearrange([*k, *v[1:]], "n f h s d -> f n h s d"))
        # the frames are folded into the sequence: four dimensions keep the fused kernels
        folded = rearrange(edited, "f n h s d -> n 1 h (f s) d")
        keys, values = folded[:maps], folded[maps:].unflatten(0, (maps, -1))
        for query, key, value in zip(q, keys, values, strict=True):
            query = rearrange(query, "f h s d -> 1 h (f s) d")
            out = attend(query, key, value, site.scale)
            attended.append(rearrange(out, "n 1 h (f s) d -> (n f) h s d", f=frames))
        output = site.output(torch.cat(attended), **given)
        if self.bank is not None:
            outputs = rearrange(output, "(b f) s c -> f b s c", b=b)
            seen = torch.cat([hidden_states[:frames, None], outputs], dim=1)
            source, outputs = self.exchange_halo(seen).split([1, b], dim=1)
            self.bank.source[site.name] = source[:, 0]
            self.bank.outputs[site.name] = outputs.transpose(0, 1)
        return output


Look = Callable[[Tensor, Window, Correspondence], None]
"""Called with a window's source tokens, the window at its site, and the correspondence found."""


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
        self.first: int | None = None

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
            who = f"{named(self.kernel)} at {window.site}"
            check_correspondence(found, source, keys, who)
        if self.look is not None:
            self.look(source, window, found)


class PropagatedAttention:
    """No attention: every token takes the keyframes' outputs at its correspondence (equation 6).

    Args:
        branches: Of the network's batch.
        bank: Of the step's joint pass.
        matcher: What finds correspondences.
        window: The frames of the pass and their neighbouring keyframes.
        used: Which keyframes of the bank these are.
    """

    def __init__(
        self, branches: int, bank: Bank, matcher: Matcher, window: Window, used: list[int]
    ) -> None:
        self.branches, self.bank, self.matcher = branches, bank, matcher
        self.window, self.used = window, used

    def __call__(
        self, site: Site, hidden_states: Tensor, *_: Any, **__: Any
    ) -> Float[Tensor, "batch tokens channels"]:
        source = hidden_states[: len(hidden_states) // self.branches]
        # one by one: a list of indices would be sent to an accelerator, and waited for
        keys = torch.stack([self.bank.source[site.name][k] for k in self.used])
        outputs = torch.stack([self.bank.outputs[site.name][:, k] for k in self.used], dim=1)
        window = self.matcher.at_site(self.window, site.name, keys)
        with blamed(self.matcher.kernel, "correspond"):
            found = self.matcher.kernel.correspond(source, keys, window)
        self.matcher.inspect(found, source, keys, window)
        with blamed(self.matcher.kernel, "gather"):
            return found.gather(outputs).flatten(0, 1)
