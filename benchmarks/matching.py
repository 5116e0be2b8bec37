"""Correspondences between a source's tokens, against its exact flow; nothing is edited.

    python benchmarks/matching.py

prints how far each kernel is from the truth at the sites of each size, in minutes.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from miniature_edits import KERNELS, inverted, kernel_of, textured
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import interpolate

from tokenflow.diffusion import Backbone
from tokenflow.engine.attention import AttentionSwitch, Bank, JointAttention, Matcher
from tokenflow.engine.keyframes import draw_keyframes, neighbourhood, split_windows
from tokenflow.miniature.edits import SceneFlow
from tokenflow.miniature.scenes import Scene
from tokenflow.propagation import ClipFlow, Correspondence, Window


@torch.no_grad()
def main(frames: int = 16, steps: int = 10, clips: tuple[int, ...] = (0, 1, 2, 3, 4, 5)) -> None:
    """How far correspondences are from the truth, in latent pixels of the site, by site size.

    Args:
        frames: Frames of a clip, with keyframes in the middle of windows of 8.
        steps: Inversion steps; tokens are compared at the first, middle and last.
        clips: Which of the six edits' sources.
    """
    backbone, console = Backbone.load("miniature", dtype="float32"), Console(width=120)
    errors: dict[tuple[str, int], list[Tensor]] = {}
    windows = split_windows(frames, 8)
    keyframes = draw_keyframes(windows, "center", 0, "", 0)
    window, _ = neighbourhood(range(frames), windows, keyframes)
    for number in clips:
        edit = textured(frames)[number]
        scene, prompt = edit.scene, backbone.embed([str(edit.scene.attributes)])
        schedule, trajectory, _ = inverted(backbone, edit, steps)
        kernels = {name: kernel_of(name, scene) for name in KERNELS}
        flows = {
            name: ClipFlow(edit.clip, kernel.flow or SceneFlow(scene), backbone.latent_scale)
            for name, kernel in kernels.items()
        }
        switch = AttentionSwitch(backbone.sites())
        for i in (0, steps // 2, steps - 1):
            bank, x = Bank(), trajectory.at(i)
            switch.attention = JointAttention(1, bank)
            with switch.installed():
                backbone.predict(x, schedule.timesteps[i], prompt.per_frame(frames))
            for site, tokens in bank.source.items():
                keys = tokens[keyframes]
                for name, kernel in kernels.items():
                    here = Matcher(kernel, trajectory.size, flows[name]).at_site(window, site, keys)
                    truth = flows["FlowWeighted exact"].motion(here, keys.device).displacement
                    found = kernel.correspond(tokens, keys, here)
                    error = distance(found, here, truth)
                    seen = visible(scene, here)
                    errors.setdefault((name, here.width), []).append(error[seen])
    table = Table(title="mean distance from the truth, latent pixels, of what is visible")
    widths = sorted({width for _, width in errors}, reverse=True)
    for column in ("", *(f"{width}x{width}" for width in widths)):
        table.add_column(column, justify="right" if column else "left")
    for name in KERNELS:
        means = (float(torch.cat(errors[name, width]).mean()) for width in widths)
        table.add_row(name, *(f"{mean:.3f}" for mean in means))
    console.print(table)


def distance(
    found: Correspondence, window: Window, truth: Float[Tensor, "frames 2 tokens 2"]
) -> Float[Tensor, "frames 2 tokens"]:
    """From each token's mean place in either neighbour to its true one."""
    tokens = window.height * window.width
    taps, weights = (x.unflatten(-1, (2, -1)) for x in (found.indices % tokens, found.weights))
    places = torch.stack((taps % window.width, taps // window.width), dim=-1)
    share = weights / weights.sum(dim=-1, keepdim=True).clamp(min=1e-9)
    mean = (places * share[..., None]).sum(dim=-2).transpose(1, 2)
    own = torch.arange(tokens)
    return (mean - torch.stack((own % window.width, own // window.width), dim=-1) - truth).norm(
        dim=-1
    )


def visible(scene: Scene, window: Window) -> Bool[Tensor, "frames 2 tokens"]:
    """Tokens that a neighbour, not the frame itself, shows completely."""
    size = (window.height, window.width)

    def shown(frame: int, keyframe: int, blend: float) -> Tensor:
        if blend == 0 or frame == keyframe:
            return torch.zeros(size).bool()
        pixels = scene.visible(frame, keyframe)[None, None].float()
        return interpolate(pixels, size, mode="area")[0, 0] > 0.999

    rows = zip(window.frames, window.neighbours.tolist(), window.blend.tolist(), strict=True)
    seen = [shown(f, window.keyframes[ks[n]], bs[n]) for f, ks, bs in rows for n in range(2)]
    return torch.stack(seen).flatten(1).unflatten(0, (-1, 2))


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main, as_positional=False)
