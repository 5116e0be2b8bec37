"""FlowEdit (Kulikov et al. 2024, arXiv 2412.08629): along the difference of two velocities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxtyping import Float
from torch import Tensor

from tokenflow.diffusion import Schedule, Source, guide
from tokenflow.editors.base import Start, Step
from tokenflow.editors.inversion_free import InversionFree
from tokenflow.errors import InputError


class FlowEdit(InversionFree):
    """Moves the source by the velocity for the prompt less that for what the source shows.

    Both are asked for at the same noise, so that nothing is inverted. Models that predict noise are
    taken as flow models: a latent over signal + noise is one of flow at t = noise / (signal +
    noise), and its velocity is n - x0.

    Args:
        n_max: How many steps run, the last ones; at most all. Two thirds if not given, as 33 of 50.
            The more, the more may change.
        n_min: How many of these, the last ones, sample freely instead, with fewer branches: less of
            the source is kept.
        n_avg: Draws of noise in each step, whose velocities are averaged; each has all branches.
        guidance_source: Scale of guidance of the source's velocity; that of the prompt's is the
            edit's own. If not given a fifth as far from 1: 3.5 for 13.5.
        noise: "independent" noise for every frame, or noise that is "shared" by all.
    """

    def __init__(
        self,
        n_max: int | None = None,
        n_min: int = 0,
        n_avg: int = 1,
        guidance_source: float | None = None,
        noise: str = "independent",
    ) -> None:
        super().__init__(guidance_source, noise, n_avg)
        if n_avg < 1:
            raise InputError(f"n_avg must be at least 1, got {n_avg}")
        if n_min < 0 or (n_max is not None and n_max < max(1, n_min)):
            raise InputError(
                f"expected n_max from 1 up and n_min from 0 to n_max, got n_max {n_max} and n_min "
                f"{n_min}; n_max counts the last steps, those that run, and n_min the last of these"
            )
        self.n_max, self.n_min, self.n_avg = n_max, n_min, n_avg

    def idle(self, step: Step) -> Sequence[str]:
        """Where it samples freely all but those of one draw of the edit, and the source."""
        read = ("source", "negative", "prompt")
        return [name for name in step.branches if name not in read] if self.sampling(step) else []

    def default_guidance(self, guidance: float, embedded: bool) -> float:
        return 1 + (guidance - 1) / 5

    def check_steps(self, steps: int) -> None:
        """Raises `InputError` for fewer steps than are to run."""
        if (run := self.running(steps)) > steps:
            raise InputError(
                f"expected {'n_min' if self.n_max is None else 'n_max'} of FlowEdit up to the "
                f"{steps} steps of the edit, got {run}; lower it, or raise steps"
            )

    def running(self, steps: int) -> int:
        """How many of so many steps run."""
        return max(1, self.n_min, round(0.66 * steps)) if self.n_max is None else self.n_max

    def start(self, source: Source, schedule: Schedule, seed: int) -> Start:
        self.check_steps(len(schedule))
        return Start(source.clean, len(schedule) - self.running(len(schedule)))

    def scale(self, schedule: Schedule, level: int) -> float:
        return schedule.signal[level] + schedule.noise[level]

    def inputs(
        self, x: Float[Tensor, "frames c h w"], step: Step, source: Source
    ) -> Float[Tensor, "branches frames c h w"]:
        found = super().inputs(x, step, source)
        if self.sampling(step):
            found[1:] = self.sampled(x, step, source)
        return found

    def sampling(self, step: Step) -> bool:
        """Whether the step is one of the last n_min, which sample freely."""
        return step.index >= len(step.schedule) - self.n_min

    def kept(self, step: Step, source: Source) -> Float[Tensor, "frames c h w"]:
        """The clean source, but noised while x is."""
        if self.clean_after(step):
            return source.clean
        noise = self.drawn(source, step.seed, len(step.schedule) - self.n_min)
        return step.schedule.mix(source.clean, noise, step.index + 1)

    def clean_after(self, step: Step) -> bool:
        """But for the steps that sample freely, whose last one ends at clean latents."""
        return not self.sampling(step) or step.index + 1 == len(step.schedule)

    def sampled(
        self, x: Float[Tensor, "frames c h w"], step: Step, source: Source
    ) -> Float[Tensor, "frames c h w"]:
        """The latents that are sampled: x itself but for the first such step, where x is clean."""
        if step.index > len(step.schedule) - self.n_min:
            return x
        noised, clean = self.noised(source, step).to(x), source.clean.to(x)
        return noised + self.scale(step.schedule, step.index) * (x - clean)

    def advance(
        self,
        x: Float[Tensor, "frames c h w"],
        outputs: Mapping[str, Float[Tensor, "frames c h w"]],
        step: Step,
        source: Source,
    ) -> Float[Tensor, "frames c h w"]:
        schedule, i = step.schedule, step.index
        if self.sampling(step):
            prompt = outputs["prompt"]
            guided = guide(outputs.get("negative", prompt), prompt, step.guidance)
            return schedule.step(guided, self.sampled(x, step, source), i)
        # clean latent and noise are linear in output and latent: so is their difference
        latents = self.scale(schedule, i) * (x - source.clean.to(x))
        x0, n = schedule.split(self.difference(outputs, step.guidance), latents, i)
        return x + (flow_time(schedule, i + 1) - flow_time(schedule, i)) * (n - x0)


def flow_time(schedule: Schedule, level: int) -> float:
    """The time, from 1 for noise to 0 for clean latents, of the flow that a level belongs to."""
    if level == len(schedule):
        return 0.0
    return schedule.noise[level] / (schedule.signal[level] + schedule.noise[level])
