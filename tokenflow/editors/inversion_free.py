"""Editors that compare what the network makes of the source and of the edit, both noised alike."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from tokenflow.diffusion import Conditioning, Schedule, Source, frame_noise, guide
from tokenflow.editors.base import Batch, Editor, Prompts, Step
from tokenflow.errors import InputError

NOISES = ("independent", "shared")
Noise = Callable[[int, int, int], Tensor]
"""The noise (c, h, w) of a frame, by its position in the clip, the step and the draw, from 0."""
E = TypeVar("E", bound="InversionFree")


class InversionFree(Editor):
    """Noises the clean source in each step, and the edit with it, instead of inverting the source.

    x are clean latents, the source's at first. Each branch of a draw is the source's or the edit's,
    with and without a prompt.

    Args:
        guidance_source: Scale of classifier-free guidance of the source's output, 1 for none; a
            step without guidance has none here either. None: `default_guidance`.
        noise: "independent" noise for every frame, or noise that is "shared" by all.
        draws: Of noise in each step.
    """

    interface = 2
    inverts: ClassVar[bool] = False
    joint_source: ClassVar[bool] = True

    def __init__(self, guidance_source: float | None, noise: str, draws: int = 1) -> None:
        if guidance_source is not None and not abs(guidance_source) < float("inf"):
            raise InputError(f"guidance_source must be a finite number, got {guidance_source}")
        if noise not in NOISES:
            raise InputError(f"noise must be one of {', '.join(NOISES)}, got {noise!r}")
        self.guidance_source, self.noise, self.draws = guidance_source, noise, draws
        self.given: Noise | None = None

    def with_noise(self: E, noise: Noise | Float[Tensor, "steps draws frames c h w"]) -> E:
        """This editor with noise from outside: a function of frame, step and draw, or a tensor.

        The function is called more than once with the same arguments. Steps are those of the
        schedule, also the ones that do not run; frames are positions in the clip.
        """
        if isinstance(noise, Tensor):
            values = noise
            self.given = lambda frame, step, draw: values[step, draw, frame]
        else:
            self.given = noise
        return self

    @property
    def guided(self) -> Sequence[str]:
        return [
            label(kind, n) for n in range(self.draws) for kind in ("source_negative", "negative")
        ]

    @property
    def conditions_source(self) -> bool:
        return False

    @property
    def sees_other_frames(self) -> bool:
        return False

    def branches(self, prompts: Prompts) -> Mapping[str, str]:
        one = {
            "source": prompts.inversion_prompt,
            "source_negative": prompts.negative_prompt,
            "negative": prompts.negative_prompt,
            "prompt": prompts.prompt,
        }
        if self.source_scale(2.0) == 1:  # whatever the edit's
            del one["source_negative"]
        return {label(kind, n): text for n in range(self.draws) for kind, text in one.items()}

    @abstractmethod
    def default_guidance(self, guidance: float, embedded: bool) -> float:
        """The scale for the source's output where none is given, by that for the edit's.

        `embedded` is true where the network embeds the scale, and needs no negative prompt.
        """

    def source_scale(self, guidance: float, embedded: bool = False) -> float:
        """The scale of guidance of the source's output, by that of the edit's."""
        chosen = self.guidance_source
        return self.default_guidance(guidance, embedded) if chosen is None else chosen

    def conditioning(self, batch: Batch) -> Conditioning:
        """With the source's own scale, where the network embeds it."""
        tensors = dict(batch.conditioning.tensors)
        if "guidance" not in tensors:
            return batch.conditioning
        scales = tensors["guidance"].unflatten(0, (len(batch.branches), -1)).clone()
        edited = float(scales[batch.branches.index("prompt"), 0])
        for branch, scale in zip(batch.branches, scales, strict=True):
            if branch.startswith("source"):
                scale.fill_(1.0 if edited == 1 else self.source_scale(edited, embedded=True))
        return Conditioning(**tensors | {"guidance": scales.flatten(0, 1)})

    def inputs(
        self, x: Float[Tensor, "frames c h w"], step: Step, source: Source
    ) -> Float[Tensor, "branches frames c h w"]:
        """The noised source, and the same moved by x - source at the scale that it has there."""
        clean = source.clean.to(x)
        moved = self.scale(step.schedule, step.index) * (x - clean)
        latents = dict[str, Tensor]()
        for n in range(self.draws):
            noised = self.noised(source, step, n).to(x)
            for kind in ("source", "source_negative"):
                latents[label(kind, n)] = noised
            for kind in ("negative", "prompt"):
                latents[label(kind, n)] = noised + moved
        return torch.stack([latents[branch] for branch in step.branches])

    @abstractmethod
    def scale(self, schedule: Schedule, level: int) -> float:
        """By what a difference of clean latents is multiplied in noised ones."""

    def noised(self, source: Source, step: Step, draw: int = 0) -> Float[Tensor, "frames c h w"]:
        """The source at the step's level."""
        return step.schedule.mix(
            source.clean, self.drawn(source, step.seed, step.index, draw), step.index
        )

    def drawn(
        self, source: Source, seed: int, step: int, draw: int = 0
    ) -> Float[Tensor, "frames c h w"]:
        """A step's noise, for every frame.

        Raises:
            InputError: Noise from outside has another shape than a latent.
        """
        shape = source.clean.shape[1:]
        if self.given is None:
            frames = [0] * len(source) if self.noise == "shared" else source.frames
            return torch.stack([frame_noise(seed, f, shape, step, draw) for f in frames])
        each = [self.given(frame, step, draw) for frame in source.frames]
        if wrong := [tuple(one.shape) for one in each if one.shape != shape]:
            raise InputError(
                f"expected noise of a latent's shape {tuple(shape)} for each frame, got "
                f"{wrong[0]}; mend the noise that {type(self).__name__} is given"
            )
        return torch.stack(each).to(source.clean)

    def difference(
        self, outputs: Mapping[str, Float[Tensor, "frames c h w"]], guidance: float
    ) -> Float[Tensor, "frames c h w"]:
        """The guided output for the edit less that for the source, the mean of all draws."""
        scale = self.source_scale(guidance)
        each = []
        for n in range(self.draws):
            prompt, source = outputs[label("prompt", n)], outputs[label("source", n)]
            edited = guide(outputs.get(label("negative", n), prompt), prompt, guidance)
            kept = guide(outputs.get(label("source_negative", n), source), source, scale)
            each.append(edited - kept)
        return torch.stack(each).mean(dim=0)


def label(kind: str, draw: int) -> str:
    """A branch's name: of the first draw its kind, of others with their number."""
    return kind if draw == 0 else f"{kind}_{draw + 1}"
