"""How a clip is edited."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal, get_args

from tokenflow.diffusion import Backbone
from tokenflow.diffusion.inversion import InversionSolver
from tokenflow.editors import Editor
from tokenflow.editors.base import overrides
from tokenflow.engine.keyframes import Blend, Keyframes, Neighbours, draw_keyframes
from tokenflow.errors import InputError

ConsistencyName = Literal["tokenflow", "joint", "none"]
KeyframeAttention = Literal["full", "windowed"]
FUSION = 0.8  # docs/benchmark.md


@dataclass(frozen=True)
class Settings:
    """How a clip is edited; the defaults are the paper's, but for two.

    With `fusion` 0 and `keyframe_attention` "full" (configuration paper) they are.

    Args:
        steps: Sampling steps.
        inversion_steps: Inversion steps, at least as many; as many as sampling when not given.
        inversion_solver: "ddim" (paper) or "uni-inv", whose round trip through few steps is nearer
            to the source.
        record_source: Record correspondences and injected features while the source is inverted,
            so that sampling runs without the source's branch. The result differs a little. All
            frames are inverted side by side, which begins anew where it is interrupted. Editors
            that need the source's branch have it.
        guidance: Scale of classifier-free guidance. The model's own if not given: 7.5 for Stable
            Diffusion.
        guidance_begin: Share of the schedule before which guidance is off, 0 to 1.
        guidance_end: Share of the schedule after which it is off; a step without guidance is a
            branch cheaper (Kynkäänniemi et al. 2024, arXiv 2404.07724).
        keyframe_every: Frames in a window; one keyframe is drawn from each.
        keyframes: How it is drawn: "random", "center", "first", or a fixed offset.
        neighbours: Which keyframes a frame takes its features from: "bracketing" (paper) or
            "previous" (published code).
        blend: Their weights over time: "sigmoid" (paper) or "linear".
        fusion: Share of its keyframes' predicted clean latents, moved by optical flow (the
            kernel's, or `LatentFlow`), in a frame's own, 0 (paper) to 1. If not given, 0.8 for
            editors that invert the source and have no `advance` of their own, wherever keyframes
            are propagated along a flow.
        fusion_end: Share of the schedule after which fusion is off, 0 to 1: less than 1 gives
            stronger details and more flicker.
        consistency: "tokenflow"; "joint" lets all frames attend to each other and propagates
            nothing; "none" edits every frame on its own.
        keyframe_attention: Which keyframes attend to each other: "full" (paper) lets all of a
            clip's; "windowed" those of `span` consecutive windows, of the ones beside them, and the
            anchors, so that time grows as the number of frames and memory on the device not at
            all.
        span: How many windows; where the clip has no more, both are the same. In fusion the
            keyframes of so many vote together, whatever the attention.
        anchors: How many keyframes, spread over the whole clip, attend in every span.
        seed: Of everything random.
        batch: Frames in one forward pass; changes memory and speed, not the result. The keyframes
            of a joint pass, and all frames where consistency is "joint", go through at once.
        mask_edge: Pixels, inside of a local edit's mask, over which the source turns into the edit.
        report_reconstruction: Also sample back without an edit and report the PSNR.

    An option that an edit would not use is refused: `require_used`.
    """

    steps: int = 50
    inversion_steps: int | None = None
    inversion_solver: InversionSolver = "ddim"
    record_source: bool = False
    guidance: float | None = None
    guidance_begin: float = 0.0
    guidance_end: float = 1.0
    keyframe_every: int = 8
    keyframes: Keyframes = "random"
    neighbours: Neighbours = "bracketing"
    blend: Blend = "sigmoid"
    fusion: float | None = None
    fusion_end: float = 1.0
    consistency: ConsistencyName = "tokenflow"
    keyframe_attention: KeyframeAttention = "windowed"
    span: int = 8
    anchors: int = 2
    seed: int = 0
    batch: int = 8
    mask_edge: float = 0.0
    report_reconstruction: bool = False

    def __post_init__(self) -> None:
        names = {
            "inversion_solver": InversionSolver,
            "neighbours": Neighbours,
            "blend": Blend,
            "consistency": ConsistencyName,
            "keyframe_attention": KeyframeAttention,
        }
        for name, kind in names.items():
            if getattr(self, name) not in get_args(kind):
                raise InputError(
                    f"{name} must be one of {get_args(kind)}, got {getattr(self, name)!r}"
                )
        draw_keyframes([range(1)], self.keyframes, self.seed, "", 0)  # refuses unknown policies
        least = {"steps": 1, "keyframe_every": 1, "span": 1, "anchors": 0, "batch": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise InputError(f"{name} must be at least {low}, got {getattr(self, name)}")
        if not 0 <= self.mask_edge < math.inf:
            raise InputError(f"mask_edge must be a number of pixels, got {self.mask_edge}")
        if not -(2**63) <= self.seed < 2**63:
            raise InputError(f"seed must be a number of 64 bits, got {self.seed}")
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise InputError(f"guidance must be a finite number, got {self.guidance}")
        if not 0 <= self.guidance_begin <= self.guidance_end <= 1:
            raise InputError(
                f"guidance_begin and guidance_end must be shares of the schedule from 0 to 1, the "
                f"first not the larger, got {self.guidance_begin} and {self.guidance_end}"
            )
        if self.fusion is not None and not 0 <= self.fusion <= 1:
            raise InputError(f"fusion must be a share from 0 to 1, got {self.fusion}")
        if not 0 <= self.fusion_end <= 1:
            raise InputError(
                f"fusion_end must be a share of the schedule from 0 to 1, got {self.fusion_end}"
            )
        if self.inversion_steps is not None and self.inversion_steps < self.steps:
            raise InputError(
                f"inversion needs at least as many steps as sampling: got inversion_steps "
                f"{self.inversion_steps} for steps {self.steps}; raise the one or lower the other"
            )

    def guidance_at(self, step: int, steps: int) -> float:
        """The scale at step i of N: outside of int(N · begin) <= i < int(N · end) it is 1."""
        assert self.guidance is not None, "Settings.for_model comes before"
        on = int(steps * self.guidance_begin) <= step < int(steps * self.guidance_end)
        return self.guidance if on else 1.0

    def fusion_at(self, step: int, steps: int) -> float:
        """The share at step i of N: from i = int(N · end) on it is 0."""
        assert self.fusion is not None, "Settings.for_flow comes before"
        return self.fusion if step < int(steps * self.fusion_end) else 0.0

    def require_used(self, editor: Editor | None, *, fuses: bool, mask: object) -> None:
        """Raises `InputError` for an option that would change nothing.

        Args:
            editor: Of the edit; if it is not known yet, what depends on it is not asked.
            fuses: Whether the way of consistency fuses what keyframes predict.
            mask: That of a local edit, if it is one.
        """
        if self.fusion and not fuses:
            raise InputError(
                f"fusion takes what keyframes predict, and this way of consistency does not: "
                f"expected fusion 0, got {self.fusion}; leave it out, or take consistency tokenflow"
            )
        by_default = fuses and (editor is None or self.fuses(editor))
        # with fusion 0 it may stay, as to compare, or where run.yaml is run again
        if self.fusion_end < 1 and self.fusion is None and not by_default:
            on = f"fusion {FUSION}" if fuses else "consistency tokenflow"
            raise InputError(
                f"fusion_end ends fusion, and this edit has none: expected fusion_end 1, got "
                f"{self.fusion_end}; leave it out, or choose {on}"
            )
        if self.mask_edge and mask is None:
            raise InputError(
                f"mask_edge softens the border of a local edit, and there is no mask: expected "
                f"mask_edge 0, got {self.mask_edge}; leave it out, or give --model.mask (in Python "
                f"mask=)"
            )
        given = {
            "inversion_steps null": self.inversion_steps not in (None, self.steps),
            "inversion_solver ddim": self.inversion_solver != "ddim",
            "record_source false": self.record_source,
            "report_reconstruction false": self.report_reconstruction,
        }
        right = [text for text, found in given.items() if found]
        wrong = [f"{name} {getattr(self, name)}" for name in (text.split()[0] for text in right)]
        if wrong and editor is not None and not editor.inverts:
            raise InputError(
                f"the editor does not invert the source: expected {' and '.join(right)}, the "
                f"defaults, got {' and '.join(wrong)}; leave that out (the fast mode's "
                f"configuration sets it, too), or choose an editor that inverts, as PnP"
            )

    def for_model(self, model: Backbone) -> Settings:
        """With the model's own value for what is not given."""
        guidance = model.defaults.guidance if self.guidance is None else self.guidance
        steps = self.steps if self.inversion_steps is None else self.inversion_steps
        return dataclasses.replace(self, guidance=guidance, inversion_steps=steps)

    def fuses(self, editor: Editor) -> bool:
        """Whether predictions are fused, if there are keyframes and a flow to move them by."""
        if self.fusion is not None:
            return self.fusion > 0
        # what an editor's own step keeps, such as a background, would be mixed again
        return editor.inverts and not overrides(editor, "advance")

    def for_flow(self, found: bool) -> Settings:
        """With the share of fusion where it is not given: none without a flow to move it by."""
        return dataclasses.replace(
            self, fusion=FUSION * found if self.fusion is None else self.fusion
        )
