"""One call of a kernel, as the engine makes it, with random tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tokenflow.engine.keyframes import neighbourhood, split_windows
from tokenflow.propagation import ClipFlow, Correspondence, Propagation, Window
from tokenflow.propagation.kernel_contract import violations
from tokenflow.testing.checks import require_kept
from tokenflow.testing.tiny import tiny_clip

FRAMES, CHANNELS = 9, 8
SQUARE = (4, 4)
PIXELS = 4
"""Pixels of a frame in one token of the site."""


@dataclasses.dataclass(frozen=True)
class KernelCall:
    """What a kernel is given in one call."""

    source: Float[Tensor, "frames tokens channels"]
    keys: Float[Tensor, "keyframes tokens channels"]
    window: Window

    @classmethod
    def random(
        cls,
        kernel: Propagation,
        frames: Sequence[int] = range(6),
        size: tuple[int, int] = SQUARE,
        keyframes: Sequence[int] = (1, 5, 8),
        seed: int = 0,
    ) -> KernelCall:
        """Random tokens for the frames of a clip with these keyframes; the same for a seed."""
        height, width = size
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randn(FRAMES, height * width, CHANNELS, generator=generator)
        windows = split_windows(FRAMES, 4)
        window, used = neighbourhood(range(frames[0], frames[-1] + 1), windows, keyframes)
        window = dataclasses.replace(window, height=height, width=width, site="site")
        if kernel.flow is not None:
            clip = tiny_clip(FRAMES, PIXELS * height, PIXELS * width)
            motion = ClipFlow(clip, kernel.flow, PIXELS).motion(window, tokens.device)
            window = dataclasses.replace(window, motion=motion)
        return cls(tokens[list(frames)], tokens[[keyframes[k] for k in used]], window)

    def ask(self, kernel: Propagation, *rules: str) -> Correspondence:
        """The kernel's answer, of the right form, which keeps these rules of its contract."""
        found = kernel.correspond(self.source, self.keys, self.window)
        require_kept(violations(found, self.source, self.keys), "form", *rules)
        return found

    def matrix(self, kernel: Propagation) -> Float[Tensor, "frames tokens clip_tokens"]:
        """The answer as a dense matrix over the tokens of all frames of the clip."""
        found, tokens = self.ask(kernel), self.source.shape[1]
        starts = torch.tensor(self.window.keyframes) * tokens
        indices = found.indices.long().cpu()
        columns = starts[indices // tokens] + indices % tokens
        empty = torch.zeros(*indices.shape[:2], FRAMES * tokens)
        return empty.scatter_add(2, columns, found.weights.float().cpu())
