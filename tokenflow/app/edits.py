"""Edits one after the other on one device, each with its progress and its preview."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from queue import Empty, Queue
from threading import Condition, Event, Thread
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from tokenflow.app.request import Requests
from tokenflow.diffusion import Backbone
from tokenflow.engine.lightning.callback import EditCallback
from tokenflow.engine.lightning.job import Job, plugin_key
from tokenflow.engine.lightning.module import TRAINER, TokenFlowModule
from tokenflow.engine.lightning.progress import edit_to_inversion
from tokenflow.engine.progress import Reporter
from tokenflow.engine.region import AUTO
from tokenflow.errors import InputError, Preempted, explained
from tokenflow.memory import explained_shortage
from tokenflow.report.pictures import picture
from tokenflow.runs.files import finished
from tokenflow.video import contact_sheet, resized

EVERY = 2
"""Steps of sampling from one preview to the next."""
SHOWN, HEIGHT = 3, 200
"""Frames of a preview, and pixels of their height."""
PATIENCE = 0.25
"""Seconds between two looks for news of an edit."""
GRACE = 30.0
"""Seconds that the end of the server waits for the edit that runs."""
ENDS = ("done", "stopped", "failed")
REMEDY = "lower the resolution or the number of frames, or choose fewer frames in a batch"


@dataclasses.dataclass(frozen=True)
class News:
    """What an edit has to say: how far it is, or how it ended.

    Attributes:
        stage: "waiting", "loading", one of `edit_clip`'s, or "done", "stopped" or "failed".
        step: Steps done of the stage.
        steps: How many it has.
        pace: The time of a step and the ETA.
        preview: The clean frames that were predicted last, as the address of a picture.
        reason: Why it failed, or where it is.
    """

    stage: str
    step: int = 0
    steps: int = 0
    pace: str = ""
    preview: str = ""
    reason: str = ""


class Edit(EditCallback):
    """One edit: its news, and the request to stop it.

    Args:
        configuration: As `Requests.configuration` gives it.
    """

    def __init__(self, configuration: Mapping[str, Any]) -> None:
        self.configuration = configuration
        self.news: Queue[News] = Queue()
        self.stop, self.over = Event(), Event()
        self.preview = ""
        self.reporter, self.share = Reporter(), 0.0
        self.folder: Path | None = None

    def say(self, stage: str, **news: Any) -> None:
        """Puts news into the queue, with the last preview."""
        self.news.put(News(stage, preview=self.preview, **news))

    def on_edit_start(  # type: ignore[override]
        self, trainer: Trainer, module: TokenFlowModule, job: Job, frames: range
    ) -> None:
        self.share = edit_to_inversion(module.options(job)[1])

    def on_edit_step(
        self, trainer: Trainer, module: LightningModule, stage: str, step: int, steps: int
    ) -> Literal["stop"] | None:
        if stage == "cached":  # these frames are edited, and not inverted
            self.share *= steps / max(steps - step, 1)
        more = self.share * steps if stage == "invert" else 0.0
        self.say(
            stage, step=step, steps=steps,
            pace=self.reporter.pace(stage, step, steps - step + more),
        )  # fmt: skip
        return "stop" if self.stop.is_set() else None

    def on_prediction(  # type: ignore[override]
        self, trainer: Trainer, module: TokenFlowModule, done: int, clean: Tensor
    ) -> None:
        if done % EVERY == 1 and module.backbone is not None:
            some = torch.linspace(0, len(clean) - 1, min(len(clean), SHOWN)).round().long()
            frames = [module.backbone.decode(one[None])[0].cpu().clamp(0, 1) for one in clean[some]]
            height, width = frames[0].shape[1:]
            small = [resized(one, (HEIGHT, max(1, HEIGHT * width // height))) for one in frames]
            self.preview = picture(contact_sheet([torch.stack(small)]))


class Device:
    """Runs edits one at a time, in the order in which they came; the last model stays loaded.

    Args:
        requests: What checks and makes them.
    """

    def __init__(self, requests: Requests) -> None:
        self.requests = requests
        self.waiting: list[Edit] = []
        self.running: Edit | None = None
        self.changed = Condition()
        """Held where the two are read or changed; notified of an edit that waits."""
        self.loaded: tuple[str, Backbone] | None = None
        Thread(target=self.work, daemon=True).start()

    def run(self, edit: Edit) -> Iterator[News]:
        """An edit's news until it ends; when nobody listens any more, it stops.

        Raises:
            InputError: Too many others wait.
        """
        with self.changed:
            if self.full:
                raise InputError(f"{len(self.waiting)} edits wait already; try again later")
            self.waiting.append(edit)
            self.changed.notify()
        try:
            while True:
                try:
                    news = edit.news.get(timeout=PATIENCE)
                    while not edit.news.empty():  # a page need not see every step
                        news = edit.news.get()
                except Empty:
                    place = self.place(edit)
                    if place and edit.stop.is_set():
                        news = News("stopped", reason="It had not begun.")
                    elif place:
                        news = News("waiting", steps=place)
                    else:
                        continue
                yield news
                if news.stage in ENDS:
                    return
        finally:
            edit.stop.set()
            with self.changed:
                if edit in self.waiting:
                    self.waiting.remove(edit)
                    edit.over.set()

    @property
    def full(self) -> bool:
        """Whether as many edits wait for the one that runs as may."""
        first = self.running is None  # it waits for nothing
        return len(self.waiting) - first >= self.requests.serving.max_waiting

    def place(self, edit: Edit) -> int:
        """Which of those that wait an edit is, from 1; 0 if it does not."""
        with self.changed:
            return self.waiting.index(edit) + 1 if edit in self.waiting else 0

    def work(self) -> None:
        """Runs one edit after the other, for ever."""
        while True:
            with self.changed:
                self.changed.wait_for(lambda: bool(self.waiting))
                edit = self.running = self.waiting.pop(0)
            self.attempt(edit)
            with self.changed:
                self.running = None
            edit.over.set()

    def close(self) -> None:
        """Stops the edit that runs where it can be resumed."""
        with self.changed:
            running = self.running
            for edit in self.waiting:
                edit.stop.set()
        if running is not None:
            running.stop.set()
            running.over.wait(GRACE)

    def attempt(self, edit: Edit) -> None:
        """Runs an edit; whatever goes wrong is news of it."""
        if edit.stop.is_set():
            edit.say("stopped", reason="It had not begun.")
            return
        try:
            self.edit(edit)
        except Preempted:
            edit.say("stopped", reason="What was done is kept: the same edit goes on from there.")
        except (Exception, SystemExit) as error:  # whatever it is, the page serves others
            reason = explained(error) if isinstance(error, Exception) else repr(error)
            edit.say("failed", reason=reason)
        else:
            edit.say("done", reason=f"The run is {edit.folder.name if edit.folder else None}.")

    def edit(self, edit: Edit) -> None:
        """Runs an edit as `tokenflow predict` does, into a new folder."""
        whole, made = self.requests.complete(edit.configuration)
        module, data, writer = made.model, made.data, made.output
        edit.say("loading")
        trainer = Trainer(
            accelerator=self.requests.serving.device,
            callbacks=[writer, made.metrics, edit],
            **TRAINER,
        )
        with explained_shortage("for the edit", REMEDY):
            device = str(trainer.strategy.root_device)
            module.backbone = self.model(module, device)
            module.plugin_keys = (
                plugin_key(module.editor, whole["model"]["editor"]),
                plugin_key(module.propagation, whole["model"]["propagation"]),
            )
            (job,) = data.jobs
            self.complete(job, whole["model"])
            edit.folder = free(writer.folder / job.name)
            job.name = edit.folder.name
            writer.configuration = whole
            trainer.predict(module, datamodule=data, return_predictions=False)

    def model(self, module: TokenFlowModule, device: str) -> Backbone:
        """The module's model, loaded unless it is the last one."""
        if self.loaded is None or self.loaded[0] != module.model:
            self.loaded = None  # first, so that two are not in memory at once
            self.loaded = module.model, Backbone.load(module.model, device, module.dtype_name)
        return self.loaded[1]

    def complete(self, job: Job, model: Mapping[str, Any]) -> None:
        """Lists the files that a job reads, for its record."""
        if model.get("mask") not in (None, AUTO):
            job.mask = job.inputs["model.mask"] = Path(model["mask"])
        if model.get("depth"):
            job.inputs["model.depth"] = Path(model["depth"])
        control = (model["editor"].get("init_args") or {}).get("condition") or {}
        if path := (control.get("init_args") or {}).get("path"):
            job.inputs["model.editor.condition.path"] = Path(path)


def free(folder: Path) -> Path:
    """The folder, or the first of its name with a number behind it that holds no run."""
    stem, number = re.sub(r"-\d+$", "", folder.name), 1
    while finished(folder):
        number += 1
        folder = folder.with_name(f"{stem}-{number}")
    return folder
