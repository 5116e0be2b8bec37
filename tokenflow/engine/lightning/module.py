"""The LightningModule: loads the model, hands each clip to `edit_clip`."""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from tokenflow.diffusion import Backbone, Embedding, LoRA
from tokenflow.diffusion.scheduler import Timesteps
from tokenflow.editors import Editor, Prompts
from tokenflow.engine.algorithm import WAYS
from tokenflow.engine.automatic_mask import require_comparable
from tokenflow.engine.checked import blamed
from tokenflow.engine.edit import Result, check_prompt, edit_clip, fuses
from tokenflow.engine.further_channels import require_given
from tokenflow.engine.keyframes import split_windows
from tokenflow.engine.lightning.callback import EditCallback, edit_callbacks, wants_predictions
from tokenflow.engine.lightning.job import PLUGINS, Job, Outcome
from tokenflow.engine.lightning.mask import cut_mask, require_one_clip
from tokenflow.engine.lightning.stopping import Stopping
from tokenflow.engine.ranks.group import FrameGroup, require_divisor
from tokenflow.engine.ranks.preemption import Preemption
from tokenflow.engine.region import AUTO, Automatic
from tokenflow.engine.resume import ResumeStore
from tokenflow.engine.settings import Settings
from tokenflow.errors import InputError
from tokenflow.plugins import origin
from tokenflow.propagation import Correspondence, Propagation, Window
from tokenflow.storage.cache import Cache
from tokenflow.storage.paths import FOLDER
from tokenflow.video import Clip, FrameBuffer, both_sides, levels, require_writable

TRAINER: dict[str, Any] = {
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "inference_mode": False,
    "use_distributed_sampler": False,
}
"""The options of Lightning's Trainer that edits need."""


def forget_frames(error: BaseException | None) -> None:
    """Frees the memory of a failed clip: the variables of the traceback's functions."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


class Prediction:
    """A result on its way to the writer, and what the run's defaults came to.

    No dataclass, as Lightning would take that apart.
    """

    def __init__(self, result: Result, resolved: dict[str, Any]) -> None:
        self.result, self.resolved = result, resolved


class TokenFlowModule(LightningModule):
    """Edits clips with a frozen text-to-image model, consistently over time.

    Args:
        prompt: What the edited video shows; a manifest's clips may have their own.
        editor: The image editing method, by class name.
        propagation: The kernel that finds correspondences, by class name.
        backbone: A folder with a Stable Diffusion, SDXL, SD 3 or Flux model in diffusers' layout,
            the id of a hub model, a checkpoint of the first two in one *.safetensors file,
            or an embedded one: "miniature", "miniature-lcm", its few-step form, or
            "miniature-transformer", in the shape of SD 3.
        dtype: Of the networks: "float32", "float16", "bfloat16", or "auto", which is float16 on
            an accelerator, and on a CPU bfloat16 where the processor computes in it, else float32.
        compile: Whether parts of the network are compiled, which takes seconds to minutes; needs a
            C++ compiler.
        negative_prompt: What the edited video does not show.
        inversion_prompt: What the source video shows.
        cache: A folder for inversions, which later edits of the same frames reuse, and for sampling
            checkpoints, from which the same command resumes; null for none.
        cache_gigabytes: The cache's limit; LRU eviction.
        cache_source: Also caches what an edit takes from the source's branch (for PnP on 120 frames
            of 512×512 some 10 GB, at most half of the limit), so that another prompt on the
            same clip takes two branches of three. Of SD 3 and Flux, steps in which PnP injects are
            not cached, as their features are much larger.
        save_every: Sampling steps between two checkpoints; null for none.
        ranks_per_clip: How many processes share a clip; all of the job's if not given. Others
            edit other clips of a manifest at the same time.
        mask: A video, folder of images or one image, white where the edit may be and black where
            the source stays exactly, of the source's length and size or the edit's; "auto" finds
            where the prompt and the inversion prompt make the model see different things; null for
            an edit everywhere. Models for inpainting need a file.
        depth: A video, folder of images or one image of the source's length and size or the edit's,
            as bright as near, for models that are given depth.
        vae: A VAE in place of the model's own: its folder in diffusers' layout, the id of a hub
            model, or a *.safetensors file.
        loras: A list of LoRAs that are added to the model's weights, each with the options `model`
            (a *.safetensors file in kohya's or diffusers' format, a folder, or the id of a hub
            model) and `scale` (1 by default).
        embeddings: A list of words whose embeddings were learned by textual inversion, each with
            the options `model` (a *.safetensors file, a folder, or the id of a hub model) and
            `token`, what prompts call it (the word in the file if not given).
        timesteps: How the model's sampling timesteps are spaced: "trailing" for Turbo, Lightning
            and Hyper, "lcm" for an LCM-LoRA, "leading" or "linspace"; null for what the model's
            scheduler says. A checkpoint in one file and a LoRA say nothing of it.
        settings: The options of `tokenflow.engine.Settings`.
    """

    def __init__(
        self,
        editor: Editor,
        propagation: Propagation,
        prompt: str = "",
        backbone: str = "miniature",
        dtype: str = "auto",
        compile: bool = False,
        negative_prompt: str = "",
        inversion_prompt: str = "",
        cache: str | None = FOLDER,
        cache_gigabytes: float = 20.0,
        cache_source: bool = True,
        save_every: int | None = 10,
        ranks_per_clip: int | None = None,
        mask: str | None = None,
        depth: str | None = None,
        vae: str | None = None,
        loras: Sequence[LoRA] = (),
        embeddings: Sequence[Embedding] = (),
        timesteps: Timesteps | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        if save_every is not None and save_every < 1:
            raise InputError(f"save_every must be at least 1 step, got {save_every}")
        self.editor, self.propagation = editor, propagation
        self.prompts: dict[str, str] = {
            "prompt": prompt,
            "negative_prompt": negative_prompt,
            "inversion_prompt": inversion_prompt,
        }
        self.model, self.vae = backbone, vae
        self.loras, self.embeddings, self.timesteps = loras, embeddings, timesteps
        self.dtype_name, self.compiled = dtype, compile
        self.mask, self.depth = mask, depth
        self.cache = None if cache is None else Cache(cache, cache_gigabytes)
        self.cache_source = cache_source
        self.save_every, self.ranks_per_clip = save_every, ranks_per_clip
        self.settings = Settings(**settings)
        self.backbone: Backbone | None = None
        self.preemption = Preemption()
        self.group = self.everyone = FrameGroup(preemption=self.preemption)
        self.number, self.groups = 0, 1  # of frame groups
        self.plugin_keys: tuple[str, str] | tuple[None, None] = (None, None)
        """Editor and kernel with their options, as text, where known: parts of cache keys."""
        self.chosen: dict[str, tuple[str, Any]] = {}
        """What the last job of a manifest chose, with its description: `Choice.described`."""

    def setup(self, stage: str) -> None:
        for name, path in (("mask", self.mask), ("depth", self.depth)):
            if path not in (None, AUTO):
                require_one_clip(self.trainer, f"model.{name}", path)
        require_divisor(self.ranks_per_clip)  # before a collective, which a rank could miss
        device = str(self.trainer.strategy.root_device)
        self.preemption = Preemption()
        self.preemption.install()
        self.everyone = FrameGroup.join(preemption=self.preemption)
        self.group = self.everyone
        if self.ranks_per_clip is not None:
            self.group = FrameGroup.join(self.ranks_per_clip, self.preemption)
        self.groups = self.everyone.size // self.group.size
        self.number = self.everyone.rank // self.group.size
        with self.everyone.together(), self.preemption.interruptible():
            if self.cache is not None:
                self.cache.require_writable()
            # whoever edits again and again has given it already
            self.backbone = self.backbone or Backbone.load(
                self.model, device, self.dtype_name, self.compiled, self.vae, self.loras,
                self.embeddings, self.timesteps,
            )  # fmt: skip
            trainer: Any = self.trainer
            if any(job.where is None for job in trainer.datamodule.jobs):
                require_given(self.backbone.further_channels, self.mask, self.depth)
        self.preemption.restore()  # else Lightning would put these handlers back after the run

    def configure_callbacks(self) -> list[Callback]:
        """What every trainer of this module needs."""
        return [Stopping()]

    def on_predict_model_eval(self) -> None:
        super().on_predict_model_eval()
        self.preemption.install()  # the first hook after Lightning has installed its own
        self.preemption.share()

    def teardown(self, stage: str) -> None:
        self.preemption.close()

    def options(self, job: Job) -> tuple[Prompts, Settings]:
        """A job's prompts and settings: its own, and for the rest the run's.

        Raises:
            InputError: No clip could be edited with them.
        """
        prompts = Prompts(**self.prompts | job.prompts)
        mask = job.edit_mask or self.mask
        try:
            check_prompt(prompts.prompt)
            if mask == AUTO:
                require_comparable(AUTO, prompts)
            settings = dataclasses.replace(self.settings, **job.settings)
            settings.require_used(
                # of an editor that is not made yet, `edit_clip` asks
                None if "editor" in job.plugins else self.editor,
                fuses=fuses(WAYS[settings.consistency]),
                mask=mask,
            )
            if "editor" not in job.plugins:
                with blamed(self.editor, "check_steps"):
                    self.editor.check_steps(settings.steps)
        except InputError as error:
            raise InputError(f"{job.where}: {error}" if job.where else str(error)) from error
        return prompts, settings

    def plugin_key(self, job: Job, name: str) -> str | None:
        """A job's editor or kernel with its options, as text, where known."""
        run = self.plugin_keys[PLUGINS.index(name)]
        own = job.plugins.get(name)
        return run if run is None or own is None else own.described

    def plugins_of(self, job: Job) -> tuple[Editor, Propagation]:
        """A job's editor and kernel.

        Those of the last job again where both choose alike, as their networks are loaded; others
        are freed first.
        """
        own = job.plugins
        self.chosen = {
            name: kept
            for name, kept in self.chosen.items()
            if name in own and own[name].described == kept[0]
        }
        for name, choice in own.items():
            if name not in self.chosen:
                self.chosen[name] = choice.described, choice.make()
        editor, propagation = (
            self.chosen[name][1] if name in self.chosen else getattr(self, name) for name in PLUGINS
        )
        return editor, propagation

    def predict_step(self, job: Job, batch_index: int) -> Prediction | Outcome | None:
        """A job's result or its status; None where other ranks have the job."""
        if batch_index % self.groups != self.number:
            return None
        try:
            self.group.meet()  # rank 0 may still be writing the clip before
            with self.group.together(), self.preemption.interruptible():
                callbacks = edit_callbacks(self.trainer) if self.group.rank == 0 else []
                reasons = (callback.admit(self.trainer, self, job) for callback in callbacks)
                reason = next(filter(None, reasons), None)
            if reason := self.group.all_gather_object(reason)[0]:
                return Outcome(job, "skipped", reason)
            return self.edited(job)
        except Exception as error:  # whatever is wrong with one clip, the others are edited
            if job.where is None or not self.group.knows(error):
                raise
            forget_frames(error)
            torch.accelerator.empty_cache() if torch.accelerator.is_available() else None
            return Outcome(job, "failed", f"{type(error).__name__}: {error}")

    def on_step(self, stage: str, step: int, steps: int) -> Literal["stop"] | None:
        """What `edit_clip` calls after every step."""
        answers = [
            one.on_edit_step(self.trainer, self, stage, step, steps)
            for one in edit_callbacks(self.trainer)
        ]
        return "stop" if self.preemption.requested or "stop" in answers else None

    def on_prediction(self, done: int, clean: Tensor) -> None:
        """What `edit_clip` calls after every step of sampling."""
        for one in edit_callbacks(self.trainer):
            one.on_prediction(self.trainer, self, done, clean)

    def edited(self, job: Job) -> Prediction:
        """A job's result, on rank 0 for the whole clip."""
        assert self.backbone is not None, "setup comes before predict_step"
        backbone, (prompts, settings) = self.backbone, self.options(job)
        editor, propagation = self.plugins_of(job)
        store = None
        if self.cache is not None:
            one, other = (self.plugin_key(job, name) for name in PLUGINS)
            store = ResumeStore(self.cache, one, other, self.save_every, self.cache_source)
        with self.group.together(), self.preemption.interruptible():
            clip = job.source.read(backbone.multiple)
            multiple, wanted = backbone.multiple, job.edit_mask or self.mask
            mask: Clip | Automatic | None = AUTO if wanted == AUTO else None
            depth = None
            if wanted not in (None, AUTO):
                mask = cut_mask(wanted, job.source, multiple, clip)
            if path := job.depth or self.depth:
                depth = cut_mask(path, job.source, multiple, clip, "depth")
            # now, as the files may change or vanish during the edit
            record = job.record() if self.group.rank == 0 else {}
            if self.group.rank == 0:  # which writes
                if job.mask is not None:  # before the edit, as it is used only afterwards
                    cut_mask(job.mask, job.source, multiple, clip)
                clip = require_writable(clip, both_sides(clip.display_size))
            shard = self.group.shard(split_windows(clip.total, settings.keyframe_every))
            for callback in edit_callbacks(self.trainer):
                callback.on_edit_start(self.trainer, self, job, shard.frames)
        result = edit_clip(
            backbone,
            clip,
            prompts,
            editor,
            propagation,
            settings,
            mask=mask,
            depth=depth,
            on_step=self.on_step,
            on_prediction=self.on_prediction if wants_predictions(self.trainer) else None,
            look=Watching(edit_callbacks(self.trainer)),
            store=store,
            ranks=self.group,
        )
        if self.group.size > 1:
            result = self.gathered(result, clip, shard.frame_counts)
        if self.cache is not None and self.group.rank == 0:
            self.cache.prune()
        resolved = {
            "source": job.source.record,
            # what stands in a configuration as a default, a name or for many clips
            "device": str(backbone.device),
            "multiple": multiple,
            "dtype": str(backbone.dtype).removeprefix("torch."),
            **dataclasses.asdict(prompts),
            **dataclasses.asdict(result.settings),
            "defaults": dataclasses.asdict(backbone.defaults),
            "editor": origin(type(editor)),
            "propagation": origin(type(propagation)),
            **record,
        }
        return Prediction(result, resolved)

    def gathered(self, result: Result, source: Clip, counts: Sequence[int]) -> Result:
        """On rank 0 the result for the whole clip, elsewhere this rank's as it is."""
        height, width = source.frames.shape[-2:]
        buffer = FrameBuffer((height, width))
        self.group.gather(map(levels, result.clip.frames), counts, buffer.append)
        if self.group.rank > 0:
            return result
        edited = dataclasses.replace(source, frames=buffer.frames)
        return dataclasses.replace(result, source=source, clip=edited)


class Watching:
    """Callbacks that correspondences are shown to."""

    def __init__(self, callbacks: Sequence[EditCallback]) -> None:
        self.callbacks = callbacks

    def wants(self, step: int) -> bool:
        """Whether one of them wants a step's."""
        return any(callback.wants_correspondences(step) for callback in self.callbacks)

    def __call__(self, source: Tensor, window: Window, found: Correspondence) -> None:
        for callback in self.callbacks:
            callback.on_correspondence(source, window, found)
