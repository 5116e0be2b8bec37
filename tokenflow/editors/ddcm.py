"""InfEdit (Xu et al. 2023, arXiv 2312.04965): a few steps of a consistency model, no inversion."""

from __future__ import annotations

from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor

from tokenflow.diffusion import Schedule, Source
from tokenflow.editors.base import Start, Step
from tokenflow.editors.inversion_free import InversionFree
from tokenflow.editors.sdedit import check_strength, steps_to_run


class DDCM(InversionFree):
    """Jumps to the clean latents in each step, by the difference of two predictions of them.

    For consistency and distilled models, in 4 to 8 steps: the denoising diffusion consistent model
    of InfEdit, without its control of attention. The prediction for the source is off by a known
    error, as its clean latents are known; the edit's is taken to be off by the same. Both are then
    noised anew, alike, to the next level.

    Args:
        strength: Share of the steps that run, the last ones, above 0 and up to 1: the lower, the
            more of the source is kept.
        guidance_source: Scale of guidance of the source's output; that of the prompt's is the
            edit's own. If not given 1, for none; the edit's own in a network that embeds it.
        noise: "independent" noise for every frame, or noise that is "shared" by all.
    """

    def __init__(
        self,
        strength: float = 1.0,
        guidance_source: float | None = None,
        noise: str = "independent",
    ) -> None:
        super().__init__(guidance_source, noise)
        check_strength(strength)
        self.strength = strength

    def default_guidance(self, guidance: float, embedded: bool) -> float:
        return guidance if embedded else 1.0

    def start(self, source: Source, schedule: Schedule, seed: int) -> Start:
        return Start(source.clean, len(schedule) - steps_to_run(self.strength, len(schedule)))

    def scale(self, schedule: Schedule, level: int) -> float:
        return schedule.signal[level]

    def advance(
        self,
        x: Float[Tensor, "frames c h w"],
        outputs: Mapping[str, Float[Tensor, "frames c h w"]],
        step: Step,
        source: Source,
    ) -> Float[Tensor, "frames c h w"]:
        schedule, i, clean = step.schedule, step.index, source.clean.to(x)
        # the clean latent is linear in output and latent: so is the difference of two
        latents = self.scale(schedule, i) * (x - clean)
        x0, _ = schedule.split(self.difference(outputs, step.guidance), latents, i)
        return clean + x0
