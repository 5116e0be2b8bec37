"""Everything that is measured of one edit, by choice."""

from __future__ import annotations

import math
from inspect import signature
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from tokenflow.diffusion.backbone import default_device
from tokenflow.errors import InputError
from tokenflow.metrics import perceptual
from tokenflow.metrics.clip_score import ClipEmbedder, frame_consistency, text_alignment
from tokenflow.metrics.fidelity import decibels, ssim
from tokenflow.metrics.flicker import LEAST, flicker
from tokenflow.metrics.judge_accuracy import judge_accuracy
from tokenflow.metrics.long_range import long_range
from tokenflow.metrics.structure import structure
from tokenflow.metrics.visibility import visible_flow
from tokenflow.miniature.judge import Judge
from tokenflow.miniature.scenes import SIZE, Attributes
from tokenflow.propagation import DIS, ClipFlow, OpticalFlow
from tokenflow.storage.scratch import BUDGET
from tokenflow.video import Clip, described

MOST_DECIBELS = 100.0
"""What stands for an infinite PSNR."""
SSIM_NEEDS = 11
"""Pixels of a side."""
SOME = 8
"""Frames that are in memory at once."""


class Measures:
    """Measures edits against their source; networks are loaded at once.

    Args:
        flow: What finds optical flow, for the warp errors: `DIS`, `RAFT` or `FlowFiles` with their
            options; `DIS` when not given.
        motion: Whose flow that is: the "source"'s, as in the paper, or the "edit"'s own, which
            files do not hold.
        distances: How many frames apart the two of a warp error are; one number, or several.
        clip: A folder with a CLIP model in transformers' layout, for text alignment and frame
            consistency.
        lpips: A file with torchvision's weights of AlexNet, for LPIPS.
        judge: Whether the miniature's judge is asked; frames must then have its scenes' size, and
            both prompts be captions of them.
        device: Where CLIP and LPIPS run: "auto" takes an accelerator if there is one, else the CPU.

    Raises:
        InputError: An option is out of its range, or a network does not load.
    """

    def __init__(
        self,
        flow: OpticalFlow | None = None,
        motion: Literal["source", "edit"] = "source",
        distances: int | tuple[int, ...] = (1, 8, 32),
        clip: str | None = None,
        lpips: str | None = None,
        judge: bool = False,
        device: str = "auto",
    ) -> None:
        distances = (distances,) if isinstance(distances, int) else distances
        if not distances or min(distances) < 1:
            raise InputError(f"expected distances of 1 frame or more, got {list(distances)}")
        if motion not in ("source", "edit"):
            raise InputError(f"motion must be 'source' or 'edit', got {motion!r}")
        self.flow, self.motion = flow or DIS(), motion
        if motion == "edit" and not self.flow.measures_frames:
            raise InputError(
                f"expected a flow that is found in frames for motion 'edit', got "
                f"{type(flow).__name__}, which has the source's for every video; use DIS or RAFT, "
                f"or motion 'source'"
            )
        where = default_device() if device == "auto" else device
        self.distances = tuple(sorted(set(distances)))
        self.clip = None if clip is None else ClipEmbedder(clip, where)
        self.lpips = None if lpips is None else perceptual.load_lpips(lpips, where)
        self.judge = Judge.load() if judge else None
        self.described = {
            "flow": type(self.flow).__name__,
            **{f"flow.{name}": value for name, value in options_of(self.flow).items()},
            "motion": motion,
            "distances": list(self.distances),
            "clip": clip,
            "lpips": lpips,
            "judge": judge,
        }

    def motions(self, source: Clip) -> ClipFlow:
        """The source with its flow, for all edits of it.

        Raises:
            InputError: The clip is too small for the flow.
        """
        return ClipFlow(source, self.flow, budget=BUDGET)

    def of(
        self,
        edited: Clip,
        source: ClipFlow,
        prompt: str = "",
        source_prompt: str = "",
        mask: Bool[Tensor, "frames height width"] | None = None,
    ) -> dict[str, float]:
        """Every measure by its name; undefined values (too few frames or pixels) are omitted.

        Args:
            edited: The edit.
            source: What it was made from, of the same size and number of frames.
            prompt: What the edit shows, for CLIP and the judge.
            source_prompt: What the source shows, for the judge.
            mask: Where the object is that was to be edited, for what is kept outside of it.

        Raises:
            InputError: Edit, source and mask do not belong together, or are too small.
        """
        new, old = edited.frames, source.clip.frames
        self.check(edited, source.clip, mask)
        parts = torch.arange(len(new)).split(SOME)
        hidden = [None if mask is None else mask[part] for part in parts]
        some = [
            self.of_some(new[part], old[part], covered, prompt, source_prompt)
            for part, covered in zip(parts, hidden, strict=True)
        ]
        each = {name: torch.cat([part[name] for part in some]) for name in some[0]}
        found: dict[str, float] = {}
        motions = source if self.motion == "source" else self.motions(edited)
        for distance in self.distances:
            if consistency := long_range(new, visible_flow(motions), distance):
                found[f"warp_error_{distance}"] = consistency.error
                found[f"visible_{distance}"] = consistency.visible
        if len(new) >= LEAST:
            found |= {"flicker": flicker(new), "flicker_source": flicker(old)}
        found["psnr"] = decibels(float(each.pop("squared").mean()))
        if mask is not None:
            outside = each.pop("squared_outside").sum() / (~mask).sum()
            found["psnr_outside"] = decibels(float(outside))
        if (images := each.pop("images", None)) is not None and len(images) > 1:
            found["clip_frames"] = float(frame_consistency(images).mean())
        found |= {name: float(values.nanmean()) for name, values in each.items()}
        # JSON has no infinity, and no NaN
        return {k: min(v, MOST_DECIBELS) for k, v in found.items() if not math.isnan(v)}

    def of_some(
        self,
        new: Float[Tensor, "some 3 height width"],
        old: Float[Tensor, "some 3 height width"],
        mask: Bool[Tensor, "some height width"] | None,
        prompt: str,
        source_prompt: str,
    ) -> dict[str, Shaped[Tensor, "some ..."]]:
        """The measures of single frames, for as many as memory holds; CLIP's as vectors."""
        squared = (new - old).square().double().mean(dim=1)
        found = {"squared": squared.mean(dim=(1, 2))}
        found |= {"ssim": ssim(new, old), "structure": structure(new, old)}
        if mask is not None:
            found["structure_outside"] = structure(new, old, mask)
            found["squared_outside"] = squared.masked_fill(mask, 0).sum(dim=(1, 2))
        if self.lpips is not None:
            found["lpips"] = perceptual.lpips(self.lpips, new, old)
        if self.clip is not None:
            found["images"], text = self.clip(new, prompt)
            if prompt:
                found["clip_text"] = text_alignment(found["images"], text)
        if self.judge is not None:
            found |= judged(self.judge, new, prompt, source_prompt)
        return found

    def check(
        self, edited: Clip, source: Clip, mask: Bool[Tensor, "frames height width"] | None
    ) -> None:
        """Raises `InputError` unless the three can be compared."""
        size = described(edited.frames)
        if described(source.frames) != size:
            raise InputError(
                f"expected edit and source of one size, got {size} for the edit {edited.name!r} "
                f"and {described(source.frames)} for the source {source.name!r}; give the source "
                f"that it was made from, cut and scaled alike"
            )
        if mask is not None and mask.shape != (len(edited), *edited.frames.shape[2:]):
            raise InputError(f"expected a mask of {size} like the edit, got {described(mask)}")
        if mask is not None and mask.flatten(1).all(dim=1).any():
            raise InputError(
                "expected a mask that leaves some of every frame, got one that hides a whole frame "
                "(what an image has as transparency is not looked at)"
            )
        if mask is not None and not mask.any():
            raise InputError(
                "expected a mask that is white where the object is, got one that is black in every "
                "frame; labels of 0 and 1 are to be made 0 and 255"
            )
        least = SSIM_NEEDS if self.lpips is None else perceptual.SMALLEST
        if min(edited.frames.shape[-2:]) < least:
            raise InputError(f"expected frames of {least}x{least} pixels or more, got {size}")
        if self.judge is not None and edited.frames.shape[-2:] != (SIZE, SIZE):
            raise InputError(
                f"the judge knows the miniature's scenes only, of {SIZE}x{SIZE} pixels, got "
                f"{size}; leave it out, or edit a clip of that size"
            )


def options_of(flow: OpticalFlow) -> dict[str, str | int | float]:
    """A flow's options that are strings, paths or numbers."""
    given = {name: getattr(flow, name, None) for name in signature(type(flow)).parameters}
    words = {k: str(v) if isinstance(v, Path) else v for k, v in given.items()}
    return {k: v for k, v in words.items() if isinstance(v, str | int | float)}


def judged(
    judge: Judge, frames: Float[Tensor, "frames 3 height width"], prompt: str, source_prompt: str
) -> dict[str, Float[Tensor, " frames"]]:
    """`judge_accuracy` by the two prompts, as 0 and 1."""
    try:
        source, target = Attributes.parse(source_prompt), Attributes.parse(prompt)
    except ValueError as error:
        raise InputError(
            f"the judge knows the miniature's scenes only, and needs captions of what source and "
            f"edit show: {error}"
        ) from error
    right = judge_accuracy(judge, frames, source, target)
    return {f"judge_{kind}": frame.float() for kind, frame in right.items()}
