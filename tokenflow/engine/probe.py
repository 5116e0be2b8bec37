"""What one self-attention site sees at one step of a sampling, for those who want to look."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from tokenflow.engine.attention import self_attention_sites
from tokenflow.errors import InputError
from tokenflow.propagation import Correspondence, Window
from tokenflow.runs.observed import Observed

SHOWN = 8
"""Frames whose tokens are kept."""

Look = Callable[[str, Tensor, Window, Correspondence], None]
"""Is told of a site, a window's source tokens there, the window, and its correspondence."""


class Observer:
    """Looks on while a rank propagates features to its own frames.

    Args:
        site: A self-attention layer; in the middle of the decoder if not given.
        step: Of sampling, from 0; if not given the middle one, or the first after it that an
            interrupted sampling goes on with.
        frame: One whose correspondence is wanted besides those that are evenly spaced.
    """

    def __init__(
        self, site: str | None = None, step: int | None = None, frame: int | None = None
    ) -> None:
        self.site, self.step, self.frame = site, step, frame
        self.seen: Observed | None = None

    def during(
        self, step: int, steps: int, frames: range, unet: UNet2DConditionModel
    ) -> Look | None:
        """Whom to tell in this step, if anybody.

        Raises:
            InputError: There is no such step or site.
        """
        wanted = steps // 2 if self.step is None else self.step
        if not 0 <= wanted < steps:
            raise InputError(f"expected a step from 0 to {steps - 1}, got {wanted}")
        site = chosen(self_attention_sites(unet), self.site)
        if self.seen is not None or step < wanted or not frames:
            return None
        places = torch.linspace(0, len(frames) - 1, min(len(frames), SHOWN)).round().int().tolist()
        shown = [frames[place] for place in places]
        tokens: dict[int, Tensor] = {}
        parts: list[tuple[Window, Correspondence]] = []

        def look(here: str, source: Tensor, window: Window, found: Correspondence) -> None:
            if here != site or not {*shown, self.frame} & {*window.frames}:
                return
            for frame, x in zip(window.frames, source.cpu(), strict=True):
                if frame in shown:
                    tokens[frame] = x.unflatten(0, (window.height, window.width))
            kept = Correspondence(found.indices.cpu(), found.weights.cpu())
            parts.append((dataclasses.replace(window, motion=None), kept))
            if len(tokens) == len(shown):
                stacked = torch.stack([tokens[frame] for frame in shown])
                self.seen = Observed(site, step, steps, shown, stacked, parts)

        return look


def chosen(sites: list[str], site: str | None) -> str:
    """The site of this name, or by default one in the middle of the decoder.

    Raises:
        InputError: There is none.
    """
    if site is None:
        decoder = [name for name in sites if name.startswith("up_blocks")] or sites
        return decoder[len(decoder) // 2]
    for name in sites:
        if site in (name, name.removesuffix(".processor")):
            return name
    names = ", ".join(name.removesuffix(".processor") for name in sites)
    raise InputError(f"there is no site {site!r}; expected one of {names}")
