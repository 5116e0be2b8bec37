"""The frozen network under an editor: one call is one forward pass of all branches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokenflow.diffusion import Backbone, Schedule, Site
from tokenflow.diffusion.backbone import Role
from tokenflow.diffusion.schedule import Timestep
from tokenflow.diffusion.sites import Attention
from tokenflow.editors import Batch, Editor, Injection, Processor, Prompts, Step
from tokenflow.engine.attention import AttentionSwitch, JointAttention, plain
from tokenflow.engine.checked import CheckedEditor, blamed
from tokenflow.engine.source_cache import SourceFeatures
from tokenflow.errors import InputError, PluginError

NONE = SourceFeatures()
PROJECTED: tuple[Role, ...] = ("queries", "keys", "values")


class EditedNetwork:
    """A frozen model's network, with an editor's conditioning, inputs and injections.

    Args:
        model: The frozen model.
        editor: The image editing method, prepared for the clip.
        prompts: Of the source, the negative one, and the edit's.
        channels: All frames', where the model has `Backbone.further_channels`.

    Raises:
        InputError: The model takes such channels and none are given, or the reverse.

    Attributes:
        branches: Names of the branches, the source first.
        source_prompt: The prompt of the source's branch.
        running: The pass that runs, if one does.
    """

    def __init__(
        self,
        model: Backbone,
        editor: Editor,
        prompts: Prompts,
        channels: Float[Tensor, "frames d h w"] | None = None,
    ) -> None:
        if (channels is None) != (model.further_channels is None):
            taken, got = model.further_channels or "nothing", "none" if channels is None else "some"
            raise InputError(
                f"expected channels of {taken} beside the latents for this model, got {got}; edit "
                f"by edit_clip or predict, or choose another model"
            )
        self.model, self.editor, self.channels = model, CheckedEditor(editor, model), channels
        found = self.editor.branches(prompts)
        self.branches = tuple(found)
        self.source_prompt = next(iter(found.values()))
        self.prompts = model.embed(list(found.values()))
        self.switch = AttentionSwitch(model.sites())
        self.projections = {n for role in PROJECTED for n in model.layers(role)}
        self.running: Batch | None = None

    @property
    def features(self) -> SourceFeatures:
        """The source's, of the pass that runs."""
        return getattr(self.switch.attention, "features", NONE)

    @property
    def matched(self) -> list[str]:
        """The sites whose outputs are propagated."""
        return [name for name, site in self.switch.sites.items() if site.matched]

    @property
    def has_text(self) -> bool:
        """Whether there are sites whose sequence holds text."""
        return any(site.has_text for site in self.switch.sites.values())

    @property
    def propagates_all(self) -> bool:
        """Whether every token of every site is propagated: no text, and all sites matched."""
        return not self.has_text and len(self.matched) == len(self.switch.sites)

    def injected(self, step: int, steps: int) -> list[str] | None:
        """The layers that are injected at a step of an edit; None where that is too much to keep.

        Where sequences hold text, or a site is not matched, the projections of all frames are
        needed in every pass.
        """
        every = self.editor.injections(self.model)
        on = [one for one in every if one.active(step, steps)]
        if not self.propagates_all and any(one.layer in self.projections for one in on):
            return None
        kinds = {(False, False): "changed", (True, False): "replaced", (True, True): "narrowed"}
        return [f"{one.layer} {kinds[one.function is None, alone(one, every)]}" for one in on]

    def branches_for(self, guidance: float) -> tuple[str, ...]:
        """The branches that a step runs: without `Editor.guided` where guidance is 1.

        A network that embeds the guidance runs without them in every step.
        """
        if guidance != 1 and "guidance" not in self.prompts:
            return self.branches
        return tuple(name for name in self.branches if name not in self.editor.guided)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """A block in which the editor's changes are in the network; afterwards it is as before."""
        cross = self.model.cross_attention()
        with ExitStack() as stack:
            stack.enter_context(self.switch.installed())
            for name, processor in self.editor.cross_attention(self.model).items():
                stack.enter_context(cross[name].replaced(CrossAttention(self, processor)))
            injections = self.editor.injections(self.model)
            for one in injections:
                stack.enter_context(self.model.hooked(one.layer))
                layer = self.model.network.get_submodule(one.layer)
                entries = self.model.entries(one.layer) if alone(one, injections) else ()
                narrowed = one.layer in self.projections.intersection(entries)
                hook = partial(self.inject, one, narrowed)
                stack.enter_context(layer.register_forward_hook(hook))
                for entry in entries:
                    module = self.model.network.get_submodule(entry)
                    stack.enter_context(module.register_forward_pre_hook(partial(self.narrow, one)))
            yield

    def narrow(self, injection: Injection, _: nn.Module, inputs: Any) -> Any:
        """The hook of what leads to a replaced layer alone: the source's rows go through it."""
        batch = self.running
        if batch is None or not injection.active(batch.step, batch.steps):
            return inputs
        rows = batch.latents.shape[1]
        if self.features.cached and injection.layer not in self.projections:
            rows = 0
        return (inputs[0][:rows], *inputs[1:])

    def inject(
        self, injection: Injection, narrowed: bool, layer: nn.Module, inputs: Any, output: Any
    ) -> Any:
        """The forward hook of an injection, into a projection of the source's rows if narrowed."""
        batch = self.running
        if batch is None or not injection.active(batch.step, batch.steps):
            return output
        if not isinstance(output, Tensor):
            raise PluginError(
                f"an injection's layer must put out a tensor: expected another than "
                f"{injection.layer}, a {type(layer).__name__}, which puts out "
                f"{type(output).__name__}; fix the editor: choose a layer inside it"
            )
        branches, frames = batch.latents.shape[:2]
        if narrowed and isinstance(self.switch.attention, JointAttention):
            tokens = f"tokens/{injection.layer.rpartition('.')[0]}"
            self.features.keep(tokens, batch.frames, inputs[0])
            return output
        if batch.inversion and injection.layer in self.projections and not batch.keyframes:
            return output  # which an edit's propagated pass does without
        name = f"{'keyframes' if batch.keyframes else 'windows'}/{injection.layer}"
        if self.features.cached:
            source = self.features.take(name, batch.frames, output)
            kept, edited = output[:0], output
        else:
            self.features.keep(name, batch.frames, output[:frames])
            kept = source = output[:frames]
            edited = output[frames:]
        if batch.inversion:
            return output
        if injection.function is None:
            return source.repeat(branches, *[1] * (output.ndim - 1))
        edited = edited.unflatten(0, (-1, frames))
        changed = self.editor.inject(injection, edited, source, batch)
        return torch.cat([kept, changed.flatten(0, 1)])

    def batch(
        self,
        inputs: Float[Tensor, "branches frames c h w"],
        frames: Sequence[int],
        step: Step,
        keyframes: bool = False,
    ) -> Batch:
        """A pass of all branches.

        Args:
            inputs: Of every branch, of all but the source's, or of the source alone, in inversion.
            frames: Their positions in the clip; of a grid of several frames, the first one's.
            step: Of sampling.
            keyframes: Whether these are keyframes, denoised jointly.
        """
        x = inputs.to(self.model.device, non_blocking=True)
        names, steps = step.branches[-len(inputs) :], len(step.schedule)
        # one by one: a list of indices would be sent to an accelerator, and waited for
        numbers = [self.branches.index(name) for name in names]
        prompts = self.prompts.map(lambda rows: torch.stack([rows[n] for n in numbers]))
        given = prompts.per_frame(len(frames))
        if "guidance" in given:  # of the source it is 1
            source = len(frames) if names[0] == self.branches[0] else 0
            given["guidance"][source:] = step.guidance
        return Batch(
            names, tuple(frames), x, given, step.t, step.index, steps, keyframes,
            inversion=names == self.branches[:1],
        )  # fmt: skip

    def source_batch(
        self,
        schedule: Schedule,
        frames: Sequence[int],
        latents: Float[Tensor, "f c h w"],
        t: Timestep,
    ) -> Batch:
        """A pass of the source alone, as inversion needs it; t may lie between sampling's steps."""
        given = self.prompts.rows([0]).per_frame(len(frames))
        names, step = self.branches[:1], min(schedule.passed(t), len(schedule) - 1)
        return Batch(
            names, tuple(frames), latents[None], given, t, step, len(schedule), inversion=True
        )

    def run(
        self, batch: Batch, attention: Attention = plain
    ) -> Float[Tensor, "branches frames c h w"]:
        """The network's output in a pass, on its device; `attention` is what the sites do."""
        conditioning, inputs = self.editor.conditioning(batch), self.editor.model_inputs(batch)
        channels = self.channels_of(batch)
        self.running, self.switch.attention = batch, attention
        try:
            # what fails in the network with an editor's inputs is the editor's
            own = conditioning is not batch.conditioning
            function = "model_inputs" if inputs else "conditioning"
            with blamed(self.editor.editor, function) if inputs or own else nullcontext():
                output = self.model.predict(
                    batch.latents.flatten(0, 1), batch.t, conditioning, **channels, **inputs
                )
        finally:
            self.running, self.switch.attention = None, plain
        return output.unflatten(0, batch.latents.shape[:2])

    def channels_of(self, batch: Batch) -> dict[str, Float[Tensor, "rows d h w"]]:
        """What a pass's frames have beside their latents, once for every branch.

        Raises:
            InputError: The pass is of grids of several frames.
        """
        if self.channels is None:
            return {}
        own = self.channels[list(batch.frames)]
        if own.shape[-2:] != batch.latents.shape[-2:]:
            raise InputError(
                f"expected passes of single frames for a model that is given their "
                f"{self.model.further_channels}, got grids; choose another way of consistency"
            )
        own = own.to(self.model.device, non_blocking=True)
        return {"channels": own.repeat(len(batch.latents), 1, 1, 1)}


def alone(injection: Injection, every: Sequence[Injection]) -> bool:
    """Whether the edited branches need not go through what leads to an injection's layer.

    No other injection may be on the layer, or beside it within a residual block.
    """
    block = injection.layer.rpartition(".")[0]
    others = {one.layer for one in every if one is not injection and one.function is not None}
    return injection.function is None and not any(
        other == injection.layer or other.startswith(f"{block}.") for other in others
    )


@dataclass(frozen=True)
class CrossAttention:
    """An editor's processor in place of a layer's cross-attention."""

    network: EditedNetwork
    processor: Processor

    def attention(self, site: Site, hidden_states: Tensor, *args: Any, **given: Any) -> Tensor:
        """What the layer calls."""
        batch = self.network.running
        if batch is None or batch.inversion:
            return site.plain(hidden_states, *args, **given)
        return self.network.editor.attend(
            self.processor, batch, site, hidden_states, *args, **given
        )
