"""The LightningModule: loads the model, hands each clip to `edit_clip`."""

from __future__ import annotations

import dataclasses
from typing import Any

from lightning.pytorch import LightningModule

from tokenflow.diffusion import Backbone
from tokenflow.diffusion.inversion import inversion_timesteps
from tokenflow.editors import Editor
from tokenflow.engine.data import ClipSource
from tokenflow.engine.editing import Progress, Result, Settings, check_prompt, edit_clip
from tokenflow.engine.frame_group import FrameGroup, Share
from tokenflow.engine.windows import split_windows
from tokenflow.plugins import origin
from tokenflow.propagation import Propagation


class Prediction:
    """A result on its way to the writer, and what the run's defaults came to.

    No dataclass, as Lightning would take that apart.
    """

    def __init__(self, result: Result, resolved: dict[str, Any]) -> None:
        self.result, self.resolved = result, resolved


class TokenFlow(LightningModule):
    """Edits clips with a frozen text-to-image model, consistently over time.

    Args:
        prompt: What the edited video shows.
        editor: The image editing method, by class name.
        propagation: The kernel that finds correspondences, by class name.
        backbone: A folder with a Stable Diffusion 1.x or 2.x model in diffusers' layout, the id
            of a hub model, or "miniature", the embedded one.
        dtype: Of the networks: "float32", "float16", "bfloat16", or "auto", which is float16 on
            an accelerator and float32 on the CPU.
        negative_prompt: What the edited video does not show.
        inversion_prompt: What the source video shows.
        report_reconstruction: Also sample back without an edit and report the PSNR.
        settings: The options of `tokenflow.engine.Settings`.
    """

    def __init__(
        self,
        prompt: str,
        editor: Editor,
        propagation: Propagation,
        backbone: str = "miniature",
        dtype: str = "auto",
        negative_prompt: str = "",
        inversion_prompt: str = "",
        report_reconstruction: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__()
        check_prompt(prompt)
        self.prompt, self.editor, self.propagation = prompt, editor, propagation
        self.model, self.dtype_name = backbone, dtype
        self.negative_prompt, self.inversion_prompt = negative_prompt, inversion_prompt
        self.report_reconstruction = report_reconstruction
        self.settings = Settings(**settings)
        self.progress: Progress = lambda stage, step, steps: None
        self.backbone: Backbone | None = None
        self.group = FrameGroup()

    def setup(self, stage: str) -> None:
        device = str(self.trainer.strategy.root_device)
        self.group = FrameGroup.of_all_ranks(device)
        self.backbone = Backbone.load(self.model, device, self.dtype_name)
        sampling = self.backbone.schedule(self.settings.steps)
        inversion_timesteps(self.inversion_steps, sampling, self.backbone)  # refuses wrong numbers

    @property
    def inversion_steps(self) -> int:
        """As many as sampling takes when not given."""
        return self.settings.inversion_steps or self.settings.steps

    def resolved(self, backbone: Backbone) -> dict[str, Any]:
        """What stands in a configuration as a default or a name."""
        return {
            "device": str(backbone.device),
            "dtype": str(backbone.dtype).removeprefix("torch."),
            "inversion_steps": self.inversion_steps,
            "editor": origin(type(self.editor)),
            "propagation": origin(type(self.propagation)),
        }

    def predict_step(self, source: ClipSource, batch_index: int) -> Prediction:
        assert self.backbone is not None, "setup comes before predict_step"
        alone = self.group.size == 1
        with self.group.together():
            clip = source.read(self.backbone.multiple, None if alone else self.needed)
        result = edit_clip(
            self.backbone,
            clip,
            self.prompt,
            self.editor,
            self.propagation,
            negative_prompt=self.negative_prompt,
            inversion_prompt=self.inversion_prompt,
            settings=self.settings,
            report_reconstruction=self.report_reconstruction,
            progress=self.progress,
            group=self.group,
        )
        if not alone:
            result = self.gathered(result, source)
        return Prediction(result, self.resolved(self.backbone))

    def share(self, frames: int) -> Share:
        """What this rank has of a clip of so many frames."""
        return self.group.share(split_windows(frames, self.settings.keyframe_every))

    def needed(self, frames: int) -> range:
        """Which of a clip's frames this rank has to see."""
        share = self.share(frames)
        return share.positions(share.held)

    def gathered(self, result: Result, source: ClipSource) -> Result:
        """On rank 0 the result for the whole clip, elsewhere this rank's as it is."""
        counts = self.share(result.clip.total).frame_counts
        levels = self.group.to_first(result.clip.frames, counts)
        if levels is None or self.backbone is None:
            return result
        whole = source.read(self.backbone.multiple)
        edited = dataclasses.replace(whole, frames=levels / 255)
        return dataclasses.replace(result, source=whole, clip=edited)
