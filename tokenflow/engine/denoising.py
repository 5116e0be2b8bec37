"""One sampling step of a clip: the joint pass over keyframes, then the pass over all frames."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from functools import partial, wraps
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor

from tokenflow.contract import require_none
from tokenflow.diffusion import Backbone, Schedule, Trajectory
from tokenflow.diffusion.sampling import guide
from tokenflow.diffusion.trajectory import rows
from tokenflow.editors import Edit, Editor, Pass, contract
from tokenflow.engine.attention import (
    Bank,
    JointAttention,
    PropagatedAttention,
    installed,
    processors,
)
from tokenflow.engine.guard import guarded, named
from tokenflow.engine.joint import JointPass, full, windowed
from tokenflow.engine.probe import Look
from tokenflow.engine.ranks.group import FrameGroup
from tokenflow.engine.ranks.shard import Share
from tokenflow.engine.spans import Span
from tokenflow.propagation import (
    ClipFlow,
    Propagation,
    Window,
    check_correspondence,
)

NAMES = ("source", "negative", "prompt")
BRANCHES = len(NAMES)

Neighbourhood = Callable[[range, Sequence[range], Sequence[int]], tuple[Window, list[int]]]
"""Of a run of frames, its `Window` and the numbers of the keyframes that it uses.

It is told the windows with keyframes within reach, and these.
"""


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
        group: The ranks that share the clip; the trajectory is of this one's frames.
        share: What this rank has of the clip's windows.
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
        flow: ClipFlow | None,
        group: FrameGroup,
        share: Share,
    ) -> None:
        self.backbone, self.trajectory, self.schedule = backbone, trajectory, schedule
        self.editor, self.embeddings, self.guidance = editor, embeddings, guidance
        self.batch, self.flow, self.group, self.share = batch, flow, group, share
        self.who = named(editor)
        edits = guarded(editor, listed(editor.edits))(backbone.unet)
        require_none(contract.of_edits(edits, backbone.unet), f"{self.who} in edits")
        self.edits = [dataclasses.replace(edit, function=self.checked(edit)) for edit in edits]

    def checked(self, edit: Edit) -> Callable[[Tensor, Tensor], Tensor]:
        """An edit's function, whose exceptions and wrong answers name the editor."""
        function = guarded(self.editor, edit.function)

        def checked(edited: Tensor, source: Tensor) -> Tensor:
            result = function(edited, source)
            require_none(contract.of_edit(result, edited), f"{self.who} in an edit")
            return result

        return checked

    def edited(self, t: int) -> AbstractContextManager[None]:
        """A block in which those of the editor's edits are on that this step asks for."""
        step, steps = self.schedule.timesteps.index(t), len(self.schedule.timesteps)
        on = [edit for edit in self.edits if step < int(steps * edit.until)]
        return installed(on, BRANCHES)

    def per_frame(self, x: Float[Tensor, "frames c h w"], t: int) -> Tensor:
        """Every frame on its own: image editing, frame by frame."""
        with self.group.together(), self.edited(t):
            return torch.cat(
                [self.guided(part, self.latents(x, t, part), t) for part in self.parts()]
            )

    def joint(self, x: Float[Tensor, "frames c h w"], t: int) -> Tensor:
        """All frames at once, each attending to all of them."""
        gather = partial(self.group.gather, counts=self.share.frame_counts)
        attention, frames = JointAttention(BRANCHES, gather=gather), self.trajectory.positions
        with (
            self.group.together(),
            self.edited(t),
            processors(self.backbone.unet, lambda _: attention),
        ):
            return self.guided(frames, self.latents(x, t, frames), t)

    def propagated(
        self,
        x: Float[Tensor, "frames c h w"],
        t: int,
        keyframes: Sequence[int],
        spans: Sequence[Span] | None,
        kernel: Propagation,
        neighbourhood: Neighbourhood,
        check: bool = False,
        look: Look | None = None,
    ) -> Tensor:
        """TokenFlow: keyframes jointly, then all frames with the keyframes' features.

        `keyframes` are the whole clip's. They attend to each other in `spans`, of which no more
        than one is on the device at a time; all of them where there are none. Where told to
        `check`, it raises `InputError` for a kernel whose answer is no correspondence.
        All that kernels are asked and answer is shown to whoever may `look`.
        """
        unet, bank, noise = self.backbone.unet, Bank(), torch.zeros_like(x)
        about = keyframes, partial(self.latents, x, t), self.group, self.share
        with self.group.together(), self.edited(t):
            for joint in full(*about) if spans is None else windowed(*about, spans):

                def attention(site: str, joint: JointPass = joint) -> JointAttention:
                    return JointAttention(BRANCHES, site, bank, joint.gather, joint.keep)

                with processors(unet, attention):
                    self.guided(joint.frames, joint.latents, t)
                held = slice(joint.held.start, joint.held.stop)
                for part in self.parts(self.share.positions(joint.windows)):
                    window, used = neighbourhood(part, self.share.windows[held], keyframes[held])
                    propagation = partial(self.propagation, bank, kernel, window, used, check, look)
                    with processors(unet, propagation):
                        here = rows(self.trajectory.positions, part)
                        noise[here] = self.guided(part, self.latents(x, t, part), t)
                bank.evict()
        return noise

    def propagation(
        self,
        bank: Bank,
        kernel: Propagation,
        window: Window,
        used: list[int],
        check: bool,
        look: Look | None,
        site: str,
    ) -> PropagatedAttention:
        """At a site, what a window's tokens take from those keyframes in the bank that it uses."""
        # one by one: a list of them would be sent to an accelerator, and waited for
        keys = torch.stack([bank.source[site][k] for k in used])
        outputs = torch.stack([bank.outputs[site][:, k] for k in used], dim=1)
        here = at_site(window, keys, self.trajectory.clean, self.flow)

        def take(source: Tensor) -> Tensor:
            found = guarded(kernel, kernel.correspond)(source, keys, here)
            if check:
                check_correspondence(found, source, keys, f"{named(kernel)} at {site}")
            if look is not None:
                look(site, source, here, found)
            return guarded(kernel, found.gather)(outputs)

        return PropagatedAttention(BRANCHES, take)

    def latents(
        self, x: Float[Tensor, "all c h w"], t: int, frames: Sequence[int]
    ) -> Float[Tensor, "frames 2 c h w"]:
        """Source and edit of some of this rank's frames, in host memory."""
        source = self.trajectory.at(t, list(frames)).to(x)
        return torch.stack([source, x[rows(self.trajectory.positions, frames)]], dim=1)

    def guided(
        self, frames: Sequence[int], latents: Float[Tensor, "frames 2 c h w"], t: int
    ) -> Float[Tensor, "frames c h w"]:
        """The guided noise of some frames from one forward pass, in host memory."""
        branches = latents.movedim(1, 0)[[0, 1, 1]].to(self.backbone.device)
        share = self.schedule.share(t)
        forward = Pass(NAMES, tuple(frames), branches, self.embeddings, t, share)
        noise = predicted(self.editor, self.backbone, forward, self.schedule)
        _, negative, prompt = noise.to(latents.device)
        return guide(negative, prompt, self.guidance)

    def parts(self, frames: range | None = None) -> list[range]:
        """Runs of these frames, all of the rank's when not given, for one forward pass each."""
        every = self.trajectory.positions if frames is None else frames
        return [every[i : i + self.batch] for i in range(0, len(every), self.batch)]


def listed(edits: Callable[[UNet2DConditionModel], Iterable[Any]]) -> Callable[..., list[Any]]:
    """`Editor.edits`, run to its end: it may be a generator."""

    @wraps(edits)
    def call(unet: UNet2DConditionModel) -> list[Any]:
        return list(edits(unet))

    return call


def predicted(
    editor: Editor, backbone: Backbone, forward: Pass, schedule: Schedule
) -> Float[Tensor, "branches frames c h w"]:
    """The UNet's noise in a pass, to which the editor may give further arguments."""
    extra = guarded(editor, editor.conditioning)(forward)
    require_none(contract.of_conditioning(extra, backbone.unet), f"{named(editor)} in conditioning")
    # what fails in the UNet with an editor's arguments is the editor's
    epsilon = guarded(editor, backbone.epsilon) if extra else backbone.epsilon
    branches, frames = forward.latents.shape[:2]
    embeddings = forward.embeddings.repeat_interleave(frames, dim=0)
    noise = epsilon(forward.latents.flatten(0, 1), forward.t, embeddings, schedule, **extra)
    return noise.unflatten(0, (branches, frames))


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
    if flow is None:
        return here
    return dataclasses.replace(here, motion=guarded(flow.flow, flow.motion)(here, keys.device))
