"""An edit without inversion, after FlowEdit (Kulikov et al. 2024, arXiv 2412.08629)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tokenflow.diffusion import Source, frame_noise, guide
from tokenflow.editors import Editor, Step


class NoInversion(Editor):
    """Moves the clean latents by how the outputs for the prompt and for the source differ."""

    interface = 2
    inverts = False  # sampling then starts from the clean latents

    def inputs(self, x: Tensor, step: Step, source: Source) -> Tensor:
        clean = source.clean.to(x)
        drawn = [frame_noise(step.seed, f, x.shape[1:], step.index) for f in source.frames]
        noised = step.schedule.mix(clean, torch.stack(drawn), step.index)
        return torch.stack([noised, *[noised + x - clean] * (len(step.branches) - 1)])

    def advance(
        self, x: Tensor, outputs: Mapping[str, Tensor], step: Step, source: Source
    ) -> Tensor:
        prompt = guide(outputs["negative"], outputs["prompt"], step.guidance)
        here, following = step.schedule.noise[step.index : step.index + 2]
        return x + (following - here) * (prompt - outputs["source"])
