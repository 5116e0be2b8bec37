"""What one attention site sees at one step of a sampling."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch
from torch import Tensor

from tokenflow.errors import InputError
from tokenflow.propagation import Correspondence, Window
from tokenflow.runs.observed import Observed

SHOWN = 8
"""Frames whose tokens are kept."""


class Probe:
    """Records a site's tokens and correspondences at one step, of a rank's own frames.

    Args:
        sites: The names of all sites.
        frames: Those that this rank edits, by position in the clip.
        steps: Of sampling.
        site: One of the sites; in the middle of the decoder if not given.
        step: From 0; if not given the middle one, or the first after it where sampling resumes.
        frame: One whose correspondence is wanted besides those that are evenly spaced.

    Raises:
        InputError: There is no such step or site.
    """

    def __init__(
        self,
        sites: Iterable[str],
        frames: range,
        steps: int,
        site: str | None = None,
        step: int | None = None,
        frame: int | None = None,
    ) -> None:
        self.step = steps // 2 if step is None else step
        if not 0 <= self.step < steps:
            raise InputError(f"expected a step from 0 to {steps - 1}, got {self.step}")
        self.site, self.steps, self.frame = chosen(list(sites), site), steps, frame
        count = min(len(frames), SHOWN)
        places = torch.linspace(0, max(len(frames) - 1, 0), count).round().int().tolist()
        self.shown = [frames[place] for place in places]
        self.tokens: dict[int, Tensor] = {}
        self.parts: list[tuple[Window, Correspondence]] = []
        self.seen: Observed | None = None

    def __call__(self, source: Tensor, window: Window, found: Correspondence) -> None:
        """Is shown a window's source tokens and its correspondence, at one site and step."""
        if window.site != self.site or self.seen is not None or window.step < self.step:
            return
        if not {*self.shown, self.frame} & {*window.frames}:
            return
        for frame, x in zip(window.frames, source.cpu(), strict=True):
            if frame in self.shown:
                self.tokens[frame] = x.unflatten(0, (window.height, window.width))
        kept = Correspondence(found.indices.cpu(), found.weights.cpu())
        self.parts.append((dataclasses.replace(window, motion=None), kept))
        if len(self.tokens) == len(self.shown):
            stacked = torch.stack([self.tokens[frame] for frame in self.shown])
            step, steps = window.step, window.steps
            self.seen = Observed(self.site, step, steps, self.shown, stacked, self.parts)


def chosen(sites: list[str], site: str | None) -> str:
    """The site of this name, or by default one in the middle of the decoder.

    Raises:
        InputError: There is none.
    """
    if site is None:
        decoder = [name for name in sites if name.startswith("up_blocks")] or sites
        return decoder[len(decoder) // 2]
    if site.removesuffix(".processor") in sites:
        return site.removesuffix(".processor")
    raise InputError(f"there is no site {site!r}; expected one of {', '.join(sites)}")
