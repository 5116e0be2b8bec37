"""A kernel for comparison, which does not match at every site and step."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from tokenflow.propagation import Correspondence, NNField, Window


class KeptMatches(NNField):
    """Nearest neighbours as `NNField` finds them, asked for less often.

    No kernel to edit with: its answers depend on what it was asked before, so that an edit which is
    resumed, or cached, may differ.

    Args:
        every: Matches are drawn anew in every n-th step, where frames keep their keyframes: the
            policy must not be random.
        shared: Whether all sites of one resolution take the matches of the first.
    """

    def __init__(self, every: int = 1, shared: bool = False) -> None:
        super().__init__()
        self.every, self.shared = every, shared
        self.kept: dict[tuple[object, ...], Correspondence] = {}
        self.drawn: int | None = None

    def correspond(
        self,
        source: Float[Tensor, "frames tokens channels"],
        keys: Float[Tensor, "keyframes tokens channels"],
        window: Window,
    ) -> Correspondence:
        if window.step // self.every != self.drawn:
            self.kept, self.drawn = {}, window.step // self.every
        site = source.shape[1] if self.shared else window.site
        place = site, window.frames, window.keyframes
        if place not in self.kept:
            self.kept[place] = super().correspond(source, keys, window)
        return self.kept[place]
