"""The LightningModule: loads the model, hands each clip to `edit_clip`."""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule

from tokenflow.diffusion import Backbone
from tokenflow.editors import Editor
from tokenflow.engine.editing import Result, check_prompt, edit_clip
from tokenflow.engine.keyframes import split_windows
from tokenflow.engine.lightning.job import PLUGINS, Job, Outcome
from tokenflow.engine.probe import Observer
from tokenflow.engine.ranks.channel import Channel
from tokenflow.engine.ranks.group import FrameGroup
from tokenflow.engine.resume import Recall
from tokenflow.engine.settings import Settings
from tokenflow.engine.source import Progress
from tokenflow.errors import InputError
from tokenflow.plugins import origin
from tokenflow.propagation import Propagation
from tokenflow.runs.observed import Observed
from tokenflow.storage.cache import Cache
from tokenflow.storage.paths import FOLDER
from tokenflow.video import Clip, Spool, both_sides, levels, require_writable


def forget_frames(error: BaseException | None) -> None:
    """Lets go of what a failed clip has left in memory: the variables of all who were at work."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


class Prediction:
    """A result on its way to the writer, what the run's defaults came to, and what a site saw.

    No dataclass, as Lightning would take that apart.
    """

    def __init__(
        self, result: Result, resolved: dict[str, Any], seen: Observed | None = None
    ) -> None:
        self.result, self.resolved, self.seen = result, resolved, seen


class TokenFlow(LightningModule):
    """Edits clips with a frozen text-to-image model, consistently over time.

    Args:
        prompt: What the edited video shows; a manifest's clips may have their own.
        editor: The image editing method, by class name.
        propagation: The kernel that finds correspondences, by class name.
        backbone: A folder with a Stable Diffusion 1.x or 2.x model in diffusers' layout, the id
            of a hub model, or "miniature", the embedded one.
        dtype: Of the networks: "float32", "float16", "bfloat16", or "auto", which is float16 on
            an accelerator and float32 on the CPU.
        negative_prompt: What the edited video does not show.
        inversion_prompt: What the source video shows.
        report_reconstruction: Also sample back without an edit and report the PSNR.
        cache: A folder for inversions, which later edits of the same frames find again, and for
            interrupted samplings, which the same command goes on with; null for none.
        cache_gigabytes: What the cache may hold; what is longest unused goes first.
        save_every: Sampling steps after which a sampling on its way is kept.
        ranks_per_clip: How many processes share a clip; all of the job's if not given. Others
            edit other clips of a manifest at the same time.
        settings: The options of `tokenflow.engine.Settings`.
    """

    def __init__(
        self,
        editor: Editor,
        propagation: Propagation,
        prompt: str = "",
        backbone: str = "miniature",
        dtype: str = "auto",
        negative_prompt: str = "",
        inversion_prompt: str = "",
        report_reconstruction: bool = False,
        cache: str | None = FOLDER,
        cache_gigabytes: float = 20.0,
        save_every: int = 10,
        ranks_per_clip: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        if save_every < 1:
            raise InputError(f"save_every must be at least 1 step, got {save_every}")
        self.editor, self.propagation = editor, propagation
        self.prompts = {
            "prompt": prompt,
            "negative_prompt": negative_prompt,
            "inversion_prompt": inversion_prompt,
        }
        self.model, self.dtype_name = backbone, dtype
        self.report_reconstruction = report_reconstruction
        self.cache = None if cache is None else Cache(cache, cache_gigabytes)
        self.save_every, self.ranks_per_clip = save_every, ranks_per_clip
        self.settings = Settings(**settings)
        self.backbone: Backbone | None = None
        self.group = self.everyone = FrameGroup()
        self.number, self.groups = 0, 1  # of frame groups
        self.channel: Channel | None = None  # between all processes
        self.described: tuple[str, str] | tuple[None, None] = (None, None)
        """Editor and kernel with their options, as text, where known."""
        self.progress: Progress = lambda stage, step, steps: None
        self.asked: Callable[[], bool] = lambda: False
        """Whether this process was asked to stop."""
        self.observer: Callable[[], Observer] = Observer
        """Makes the one who looks on while a clip is edited."""
        self.admit: Callable[[Job], str | None] = lambda job: None
        """Why a job is not to be done, if there is a reason; asked on the first rank of its group.

        Raises `InputError` where that is the user's fault.
        """

    def setup(self, stage: str) -> None:
        device = str(self.trainer.strategy.root_device)
        asked = self.asked
        if dist.is_initialized() and dist.get_world_size() > 1:
            self.channel = Channel.of_job(self.ranks_per_clip, asked)
            asked = self.channel.asked
        self.everyone = FrameGroup.join(device, asked=asked)
        self.group = FrameGroup.join(device, self.ranks_per_clip, asked)
        self.groups = self.everyone.size // self.group.size
        self.number = self.everyone.rank // self.group.size
        with self.everyone.together():
            if self.cache is not None:
                self.cache.require_writable()
            self.backbone = Backbone.load(self.model, device, self.dtype_name)

    def teardown(self, stage: str) -> None:
        if self.channel is not None:
            self.channel.close()

    def options(self, job: Job) -> tuple[dict[str, str], Settings]:
        """A job's prompts and settings: its own, and for the rest the run's.

        Raises:
            InputError: No clip could be edited with them.
        """
        prompts = self.prompts | job.prompts
        try:
            check_prompt(prompts["prompt"])
            return prompts, dataclasses.replace(self.settings, **job.settings)
        except InputError as error:
            raise InputError(f"{job.where}: {error}" if job.where else str(error)) from error

    def description(self, job: Job, name: str) -> str | None:
        """A job's editor or kernel with its options, as text, where known."""
        run = self.described[PLUGINS.index(name)]
        own = job.plugins.get(name)
        return run if run is None or own is None else own.described

    def predict_step(self, job: Job, batch_index: int) -> Prediction | Outcome | None:
        """A job's result, or what else became of it; nothing where other ranks have it."""
        if batch_index % self.groups != self.number:
            return None
        try:
            with self.group.together():
                reason = self.admit(job) if self.group.rank == 0 else None
            if reason := self.group.tell(reason)[0]:
                return Outcome(job, "skipped", reason)
            self.group.leave()
            return self.edited(job)
        except Exception as error:  # whatever is wrong with one clip, the others are edited
            if job.where is None or not self.group.knows(error):
                raise
            forget_frames(error)
            torch.accelerator.empty_cache() if torch.accelerator.is_available() else None
            return Outcome(job, "failed", f"{type(error).__name__}: {error}")

    def edited(self, job: Job) -> Prediction:
        """A job's result, on rank 0 for the whole clip."""
        assert self.backbone is not None, "setup comes before predict_step"
        backbone, (prompts, settings) = self.backbone, self.options(job)
        own = {name: choice.make() for name, choice in job.plugins.items()}
        editor, propagation = (
            own.get("editor", self.editor),
            own.get("propagation", self.propagation),
        )
        recall = None
        if self.cache is not None:
            recall = Recall(
                self.cache,
                self.description(job, "editor"),
                self.description(job, "propagation"),
                self.save_every,
            )
        observer = self.observer()
        with self.group.together():
            clip = job.source.read(backbone.multiple, each=self.group.heed)
            if self.group.rank == 0:  # which writes
                clip = require_writable(clip, both_sides(clip.display_size))
        self.group.leave()
        result = edit_clip(
            backbone,
            clip,
            editor=editor,
            propagation=propagation,
            **prompts,
            settings=settings,
            report_reconstruction=self.report_reconstruction,
            progress=self.progress,
            group=self.group,
            recall=recall,
            observer=observer,
        )
        if self.group.size > 1:
            share = self.group.share(split_windows(clip.total, settings.keyframe_every))
            result = self.gathered(result, clip, share.frame_counts)
        if self.cache is not None and self.group.rank == 0:
            self.cache.prune()
        resolved = {
            "source": job.source.record,
            **self.resolved(backbone, settings, prompts),
            "editor": origin(type(editor)),
            "propagation": origin(type(propagation)),
            **(job.record() if self.group.rank == 0 else {}),
        }
        return Prediction(result, resolved, observer.seen)

    def gathered(self, result: Result, source: Clip, counts: Sequence[int]) -> Result:
        """On rank 0 the result for the whole clip, elsewhere this rank's as it is."""
        height, width = source.frames.shape[-2:]
        spool = Spool((height, width))
        self.group.to_first(map(levels, result.clip.frames), counts, spool.append)
        if self.group.rank > 0:
            return result
        edited = dataclasses.replace(source, frames=spool.frames)
        return dataclasses.replace(result, source=source, clip=edited)

    def resolved(
        self, backbone: Backbone, settings: Settings, prompts: dict[str, str]
    ) -> dict[str, Any]:
        """What stands in a configuration as a default, a name or for many clips."""
        return {
            "device": str(backbone.device),
            "multiple": backbone.multiple,
            "dtype": str(backbone.dtype).removeprefix("torch."),
            **prompts,
            **dataclasses.asdict(settings),
            "inversion_steps": settings.inversion_steps or settings.steps,
        }
