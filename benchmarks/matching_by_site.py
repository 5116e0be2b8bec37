"""Where a network's tokens can be matched: nearest neighbours against a source's exact flow.

    python benchmarks/matching_by_site.py --model miniature-transformer

prints for each attention site and noise level, of the tokens that move by more than one token and
that the keyframe shows, which share is matched within one token of the truth, and which share to
its own place, as if the clip stood still. Nothing is edited.
"""

from __future__ import annotations

import torch
from matching import distance, visible
from miniature_edits import textured
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tokenflow.diffusion import Backbone, Site, invert
from tokenflow.engine.attention import AttentionSwitch, Matcher, plain
from tokenflow.engine.keyframes import draw_keyframes, neighbourhood, split_windows
from tokenflow.miniature.edits import SceneFlow
from tokenflow.propagation import ClipFlow, NNField


class Recorder:
    """Plain attention that keeps the tokens of the picture by site's name."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[Tensor]] = {}

    def __call__(self, site: Site, hidden: Tensor, *inputs: Tensor, **named: Tensor) -> Tensor:
        self.tokens.setdefault(site.name, []).append(site.image(hidden, **named).clone())
        return plain(site, hidden, *inputs, **named)


@torch.no_grad()
def main(
    model: str = "miniature-transformer",
    frames: int = 16,
    steps: int = 10,
    clips: tuple[int, ...] = (0, 1, 2, 3, 4, 5),
) -> None:
    """Prints the table.

    Args:
        model: Whose sites.
        frames: Frames of a clip, with keyframes in the middle of windows of 8.
        steps: Inversion steps; tokens are compared at five of their noise levels.
        clips: Which of the six edits' sources of benchmarks/miniature_edits.py.
    """
    backbone, kernel = Backbone.load(model, dtype="float32"), NNField()
    windows = split_windows(frames, 8)
    keyframes = draw_keyframes(windows, "center", 0, "", 0)
    window, _ = neighbourhood(range(frames), windows, keyframes)
    levels = [i * (steps - 1) // 4 for i in range(5)]
    near: dict[tuple[str, int], list[Tensor]] = {}
    still: dict[tuple[str, int], list[Tensor]] = {}
    for number in clips:
        edit = textured(frames)[number]
        caption = str(edit.scene.attributes)
        latents = torch.cat([backbone.encode(part) for part in edit.clip.frames.split(8)])
        schedule = backbone.schedule(steps, tuple(latents.shape[-2:]))
        trajectory = invert(backbone, latents, caption, schedule, steps)
        flow = ClipFlow(edit.clip, SceneFlow(edit.scene), backbone.latent_scale)
        matcher = Matcher(kernel, trajectory.size, flow)
        switch, prompt = AttentionSwitch(backbone.sites()), backbone.embed([caption])
        for i in levels:
            switch.attention = recorder = Recorder()
            with switch.installed():
                for part in torch.arange(frames).split(8):
                    x, t = trajectory.at(i, part.tolist()), schedule.timesteps[i]
                    backbone.predict(x, t, prompt.per_frame(len(part)))
            for site, parts in recorder.tokens.items():
                tokens = torch.cat(parts)
                keys = tokens[keyframes]
                here = matcher.at_site(window, site, keys)
                truth = flow.motion(here, keys.device).displacement
                found = kernel.correspond(tokens, keys, here)
                moving = visible(edit.scene, here) & (truth.norm(dim=-1) > 1)
                error = distance(found, here, truth)[moving]
                moved = distance(found, here, torch.zeros_like(truth))[moving]
                near.setdefault((site, i), []).append(error <= 1)
                still.setdefault((site, i), []).append(moved == 0)

    noise = [schedule.noise[i] / (schedule.signal[i] + schedule.noise[i]) for i in levels]
    table = Table(title="within one token of the truth / at their own place, moving tokens")
    for column in ("site", "tokens", *(f"noise {share:.2f}" for share in noise)):
        table.add_column(column, justify="left" if column == "site" else "right", no_wrap=True)
    for name in dict.fromkeys(site for site, _ in near):
        shares = [[torch.cat(of[name, i]).float() for i in levels] for of in (near, still)]
        if not len(shares[0][0]):
            continue  # a token is so large that none moves by one
        cells = (f"{a.mean():.0%} / {b.mean():.0%}" for a, b in zip(*shares, strict=True))
        table.add_row(name, str(len(shares[0][0])), *cells)
    Console(width=150).print(table)


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main, as_positional=False)
