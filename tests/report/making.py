"""Runs' folders, as the writer leaves them, without a model."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch import Trainer

from tokenflow.editors import SDEdit
from tokenflow.engine import Result, Settings
from tokenflow.engine.lightning.job import ClipSource, Job
from tokenflow.engine.lightning.module import Prediction, TokenFlowModule
from tokenflow.engine.lightning.run_writer import RunWriter
from tokenflow.propagation import NNField
from tokenflow.runs.observed import Observed
from tokenflow.video import AudioSpan, Clip


def bar(frames: int = 24, colour: tuple[float, float, float] = (0.2, 0.4, 0.9)) -> Clip:
    """A bar that moves by a pixel a frame, over grey; 8 frames a second, of 48×64 pixels."""
    pictures = torch.full((frames, 3, 48, 64), 0.5)
    for number in range(frames):
        pictures[number, :, :, number : number + 12] = torch.tensor(colour)[:, None, None]
    return Clip.from_frames(pictures)


def make_run(
    folder: Path,
    prompt: str = "a red bar",
    configuration: dict[str, Any] | None = None,
    sound: Path | None = None,
    seen: Observed | None = None,
    frames: int = 24,
    **resolved: Any,
) -> Path:
    """A finished run in a folder, with its page, the sound of another video and its features."""
    source, edited = bar(frames), bar(frames, (0.9, 0.1, 0.1))
    if sound is not None:
        span = AudioSpan(sound, Fraction(0), Fraction(3))
        edited = dataclasses.replace(edited, audio=span)
    resolved = {"prompt": prompt, "inversion_prompt": "a blue bar", "steps": 4} | resolved
    result = Result(
        source, edited, torch.zeros(frames, 4, 6, 8), Settings(), {"invert": 1.5, "edit": 2.5}
    )
    writer = RunWriter(str(folder.parent))
    writer.configuration = configuration or {"data": {"video": "bar.mp4"}}
    writer.probe = SimpleNamespace(seen=seen)  # type: ignore[assignment]
    trainer = Trainer(accelerator="cpu", logger=False, callbacks=[writer])
    job = Job(ClipSource(Path("bar.mp4")), folder.name)
    module = TokenFlowModule(SDEdit(), NNField())
    writer.write(trainer, module, job, Prediction(result, resolved))
    return folder
