"""What one attention site sees at one step of a sampling."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tokenflow.diffusion import Backbone, Site
from tokenflow.editors import Editor, Prompts
from tokenflow.engine.attention import Matcher, plain
from tokenflow.engine.checked import blamed
from tokenflow.engine.invert import check_size, encode_clip, ignore, invert_parts
from tokenflow.engine.keyframes import draw_keyframes, neighbourhood, split_windows
from tokenflow.engine.network import EditedNetwork
from tokenflow.engine.resume import CachedInversion
from tokenflow.engine.settings import Settings
from tokenflow.errors import InputError
from tokenflow.propagation import ClipFlow, Correspondence, Propagation, Window
from tokenflow.runs.observed import Observed
from tokenflow.video import Clip

SHOWN = 8
"""Frames whose tokens are kept."""


class Probe:
    """Records a site's tokens and correspondences at one step, of a rank's own frames.

    Args:
        sites: All of the model's.
        frames: Those that this rank edits, by position in the clip.
        steps: Of sampling.
        site: One of those that are matched; in the middle of the decoder if not given.
        step: From 0; if not given the middle one, or the first after it where sampling resumes.
        frame: One whose correspondence is wanted besides those that are evenly spaced.

    Raises:
        InputError: There is no such step or site.
    """

    def __init__(
        self,
        sites: Mapping[str, Site],
        frames: range,
        steps: int,
        site: str | None = None,
        step: int | None = None,
        frame: int | None = None,
    ) -> None:
        self.step = steps // 2 if step is None else step
        if not 0 <= self.step < steps:
            raise InputError(f"expected a step from 0 to {steps - 1}, got {self.step}")
        self.site, self.steps = chosen(sites, site), steps
        count = min(len(frames), SHOWN)
        places = torch.linspace(0, max(len(frames) - 1, 0), count).round().int().tolist()
        self.shown = [frames[place] for place in places]
        self.missing = {*self.shown, frame} & {*frames}
        self.tokens: dict[int, Tensor] = {}
        self.parts: list[tuple[Window, Correspondence]] = []
        self.seen: Observed | None = None

    def wants(self, step: int) -> bool:
        """Whether a step's correspondences are still missing."""
        return self.seen is None and step >= self.step

    def __call__(self, source: Tensor, window: Window, found: Correspondence) -> None:
        """Is shown a window's source tokens and its correspondence, at one site and step."""
        if window.site != self.site or self.seen is not None or window.step < self.step:
            return
        here = self.missing & {*window.frames}
        if not here:
            return
        for frame, x in zip(window.frames, source.cpu(), strict=True):
            if frame in self.shown:
                self.tokens[frame] = x.unflatten(0, (window.height, window.width))
        kept = Correspondence(found.indices.cpu(), found.weights.cpu())
        self.parts.append((dataclasses.replace(window, motion=None), kept))
        self.missing -= here
        if not self.missing:
            stacked = torch.stack([self.tokens[frame] for frame in self.shown])
            step, steps = window.step, window.steps
            self.seen = Observed(self.site, step, steps, self.shown, stacked, self.parts)


def chosen(sites: Mapping[str, Site], site: str | None) -> str:
    """The site of this name, or by default one in the middle of the decoder.

    Raises:
        InputError: There is none that is matched.
    """
    matched = [name for name, one in sites.items() if one.matched]
    if site is None and matched:
        decoder = [name for name in matched if name.startswith("up_blocks")] or matched
        return decoder[len(decoder) // 2]
    name = "" if site is None else site.removesuffix(".processor")
    if name in matched:
        return name
    wrong = f"nothing is propagated at {site}" if name in sites else f"there is no site {site!r}"
    raise InputError(f"{wrong}; expected one of {', '.join(matched)}")


@torch.no_grad()
def find_correspondences(
    model: Backbone,
    clip: Clip,
    kernel: Propagation,
    prompt: str = "",
    settings: Settings | None = None,
    *,
    site: str | None = None,
    step: int | None = None,
    frame: int | None = None,
) -> Observed:
    """Where a kernel finds each frame's tokens in the keyframes, without an edit.

    The clip is inverted, and the source goes through the network once more at one step.

    Args:
        model: The frozen model.
        clip: The source.
        kernel: What finds correspondences.
        prompt: What the source shows.
        settings: Of steps, windows, keyframes and neighbours.
        site: One of `model.sites()` that is matched; in the middle of the decoder if not given.
        step: Of sampling, from 0; the middle one if not given.
        frame: One whose correspondence is wanted besides those that are evenly spaced.

    Raises:
        InputError: There is no such step, site or frame, or the frames do not fit the model.
    """
    s = (settings or Settings()).for_model(model)
    check_size(model, clip)
    if frame is not None and not 0 <= frame < len(clip):
        raise InputError(f"expected a frame from 0 to {len(clip) - 1}, got {frame}")
    network = EditedNetwork(model, Editor(), Prompts(prompt, "", prompt))
    height, width = (side // model.latent_scale for side in clip.frames.shape[-2:])
    schedule = model.schedule(s.steps, (height, width))
    probe = Probe(model.sites(), range(len(clip)), s.steps, site, step, frame)
    grid = model.schedule(s.inversion_steps or s.steps, (height, width))
    inversion = schedule.refined(grid)
    cached = CachedInversion(None, clip)
    trajectory, parts = encode_clip(model, clip, schedule, inversion, s.batch, cached, {}, ignore)
    invert_parts(
        network, trajectory, parts, schedule, inversion, s.inversion_solver, cached, {}, ignore
    )
    recorder, t = Recorder(probe.site), schedule.timesteps[probe.step]
    with network.switch.installed():
        for part in torch.arange(len(clip)).split(s.batch):
            frames = part.tolist()
            x = trajectory.at(probe.step, frames).to(model.device)
            network.run(network.source_batch(schedule, frames, x, t), recorder)
    tokens = torch.cat(recorder.tokens)
    windows = split_windows(len(clip), s.keyframe_every)
    keyframes = draw_keyframes(windows, s.keyframes, s.seed, clip.name, probe.step)
    flow = None if kernel.flow is None else ClipFlow(clip, kernel.flow, model.latent_scale)
    matcher = Matcher(kernel, trajectory.size, flow, probe)
    for part in windows:
        window, used = neighbourhood(
            part, windows, keyframes, s.neighbours, s.blend, probe.step, s.steps
        )
        keys, source = (
            tokens[frames].to(model.device) for frames in ([keyframes[k] for k in used], list(part))
        )
        here = matcher.at_site(window, probe.site, keys)
        with blamed(kernel, "correspond"):
            found = kernel.correspond(source, keys, here)
        matcher.inspect(found, source, keys, here)
    assert probe.seen is not None, "the probe was shown every window"
    return probe.seen


class Recorder:
    """Records what goes into one site, whose attention stays as it is."""

    def __init__(self, site: str) -> None:
        self.site, self.tokens = site, list[Tensor]()

    def __call__(self, site: Site, hidden_states: Tensor, *args: Any, **given: Any) -> Any:
        if site.name == self.site:
            self.tokens.append(site.image(hidden_states, **given).cpu())
        return plain(site, hidden_states, *args, **given)
