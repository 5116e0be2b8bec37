"""One sampling step of a clip: the joint pass over keyframes, then the pass over all frames."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from jaxtyping import Float
from torch import Tensor

from tokenflow.diffusion import Backbone, Schedule, Trajectory
from tokenflow.diffusion.sampling import guide
from tokenflow.editors import Editor, Pass
from tokenflow.engine.attention import (
    Bank,
    JointAttention,
    PropagatedAttention,
    installed,
    processors,
)
from tokenflow.engine.guard import guarded
from tokenflow.propagation import (
    ClipFlow,
    Correspondence,
    Propagation,
    Window,
    check_correspondence,
)

NAMES = ("source", "negative", "prompt")
BRANCHES = len(NAMES)


class Denoiser:
    """The guided noise of a clip's frames under an editor, by one of three ways of consistency.

    Args:
        backbone: The frozen model.
        trajectory: The source's latents.
        schedule: Sampling's schedule.
        editor: Whose edits and conditioning are on in every pass.
        embeddings: Of the inversion prompt, the negative prompt and the prompt, (3, tokens, width).
        guidance: Scale of classifier-free guidance.
        batch: Frames in one forward pass, where frames are independent.
        flow: The clip's optical flow, for a kernel that needs it.
    """

    def __init__(
        self,
        backbone: Backbone,
        trajectory: Trajectory,
        schedule: Schedule,
        editor: Editor,
        embeddings: Float[Tensor, "3 tokens width"],
        guidance: float,
        batch: int,
        flow: ClipFlow | None = None,
    ) -> None:
        self.backbone, self.trajectory, self.schedule = backbone, trajectory, schedule
        self.editor, self.embeddings, self.guidance = editor, embeddings, guidance
        self.batch, self.flow = batch, flow
        self.edits = [
            dataclasses.replace(edit, function=guarded(editor, edit.function))
            for edit in guarded(editor, editor.edits)(backbone.unet)
        ]

    def edited(self, t: int) -> AbstractContextManager[None]:
        """A block in which those of the editor's edits are on that this step asks for."""
        step, steps = self.schedule.timesteps.index(t), len(self.schedule.timesteps)
        on = [edit for edit in self.edits if step < int(steps * edit.until)]
        return installed(on, BRANCHES)

    def per_frame(self, x: Float[Tensor, "frames c h w"], t: int) -> Tensor:
        """Every frame on its own: image editing, frame by frame."""
        with self.edited(t):
            return torch.cat([self.guided(x, part, t) for part in self.parts(len(x))])

    def joint(self, x: Float[Tensor, "frames c h w"], t: int) -> Tensor:
        """All frames at once, each attending to all of them."""
        with self.edited(t), processors(self.backbone.unet, lambda _: JointAttention(BRANCHES)):
            return self.guided(x, range(len(x)), t)

    def propagated(
        self,
        x: Float[Tensor, "frames c h w"],
        t: int,
        keyframes: Sequence[int],
        kernel: Propagation,
        neighbourhood: Callable[[range], tuple[Window, list[int]]],
        check: bool = False,
    ) -> Tensor:
        """TokenFlow: keyframes jointly, then all frames with the keyframes' features.

        `neighbourhood` gives the window of a run of frames, and which keyframes it uses. Where
        told to `check`, it raises `InputError` for a kernel whose answer is no correspondence.
        """
        unet, bank, parts = self.backbone.unet, Bank(), []
        with self.edited(t):
            with processors(unet, lambda site: JointAttention(BRANCHES, site, bank)):
                self.guided(x, keyframes, t)
            for part in self.parts(len(x)):
                window, used = neighbourhood(part)

                def attention(
                    site: str, window: Window = window, used: list[int] = used
                ) -> PropagatedAttention:
                    keys = bank.source[site][used]
                    here = at_site(window, keys, x, self.flow)

                    def correspond(source: Tensor) -> Correspondence:
                        found = guarded(kernel, kernel.correspond)(source, keys, here)
                        if check:
                            who = f"{type(kernel).__name__} at {site}"
                            check_correspondence(found, source, keys, who)
                        return found

                    return PropagatedAttention(BRANCHES, bank.outputs[site][:, used], correspond)

                with processors(unet, attention):
                    parts.append(self.guided(x, part, t))
        return torch.cat(parts)

    def guided(self, x: Float[Tensor, "all c h w"], frames: Sequence[int], t: int) -> Tensor:
        """The guided noise of some frames, (frames, c, h, w), from one forward pass."""
        chosen = list(frames)
        source = self.trajectory.at(t, chosen).to(x)
        branches = torch.stack([source, x[chosen], x[chosen]]).to(self.backbone.device)
        share = self.schedule.share(t)
        forward = Pass(NAMES, tuple(chosen), branches, self.embeddings, t, share)
        extra = guarded(self.editor, self.editor.conditioning)(forward)
        embeddings = self.embeddings.repeat_interleave(len(chosen), dim=0)
        noise = self.backbone.epsilon(branches.flatten(0, 1), t, embeddings, self.schedule, **extra)
        _, negative, prompt = noise.to(x.device).chunk(BRANCHES)
        return guide(negative, prompt, self.guidance)

    def parts(self, frames: int) -> list[range]:
        """Runs of frames for one forward pass each."""
        return [range(i, min(i + self.batch, frames)) for i in range(0, frames, self.batch)]


def at_site(
    window: Window,
    keys: Float[Tensor, "keyframes tokens channels"],
    x: Float[Tensor, "frames c h w"],
    flow: ClipFlow | None = None,
) -> Window:
    """The window as the site with these keys sees it: height and width in tokens, and motion."""
    height, width = x.shape[-2:]
    scale = round((height * width / keys.shape[1]) ** 0.5)
    here = dataclasses.replace(window, height=height // scale, width=width // scale)
    return dataclasses.replace(here, motion=flow.motion(here, keys.device)) if flow else here
