"""What a ControlNet is shown: one control image for each frame of a clip."""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import log

import cv2
import torch
from jaxtyping import Float
from torch import Tensor

from tokenflow.errors import InputError
from tokenflow.storage.paths import local
from tokenflow.video import Clip, Frames, VideoError, read_clip, transparent
from tokenflow.video.sizing import Framing

ASPECT = 0.02  # clips' sides are rounded to multiples, which stretches them a little


class Condition(ABC):
    """Makes control images; subclasses are found by their name, as editors are."""

    @abstractmethod
    def of(self, clip: Clip) -> Float[Tensor, "frames 3 height width"] | Frames:
        """The control image of every frame, of the frames' size, in 0..1, in host memory.

        Of a long clip they may be `Frames`, made when they are asked for: in every step, so they
        should be `made_once`.

        Raises:
            InputError: There is none that fits the clip.
        """


class Canny(Condition):
    """White edges on black, by OpenCV (Canny 1986), of the colour channel that changes most.

    Args:
        low: Gradient, in levels of 255, above which a pixel goes on an edge.
        high: Gradient above which it begins one.
    """

    def __init__(self, low: float = 100.0, high: float = 200.0) -> None:
        if not 0 <= low <= high:
            raise InputError(f"expected thresholds 0 <= low <= high, got low {low} and high {high}")
        self.low, self.high = low, high

    def of(self, clip: Clip) -> Float[Tensor, "frames 3 height width"] | Frames:
        def edges(position: int) -> Float[Tensor, "3 height width"]:
            return self.edges(clip.frame(position))

        return Frames(edges, clip.positions, sizes(clip)[1]).made_once().in_memory_if_small()

    def edges(self, frame: Float[Tensor, "3 height width"]) -> Float[Tensor, "3 height width"]:
        """The control image of one frame."""
        pixels = (255 * frame.cpu()).round().byte().permute(1, 2, 0).contiguous().numpy()
        edges = torch.from_numpy(cv2.Canny(pixels, self.low, self.high))
        return (edges / 255).expand(3, -1, -1)


class ControlVideo(Condition):
    """A video or folder of images made elsewhere: depth, poses, line art.

    Its frames belong to the clip's in order, one to one. Where the clip is a part of a video,
    either give the same part here, or a control video of that part alone.

    Args:
        path: A video file or a folder of images, of the clip's aspect (to within 2 %; it is scaled
            and cut as the clip was), without transparency.
        start: First frame, from 0.
        stop: Frame to end before; the control video's end when not given.
        stride: Take every so manieth frame.
    """

    def __init__(self, path: str, start: int = 0, stop: int | None = None, stride: int = 1) -> None:
        self.path, self.start, self.stop, self.stride = path, start, stop, stride

    def of(self, clip: Clip) -> Float[Tensor, "frames 3 height width"] | Frames:
        path, count = local(self.path), clip.total
        if path.exists() and (name := transparent(path)) is not None:
            raise VideoError(
                f"the control video {path} has an alpha channel (in {name}), and what lies under "
                f"it is not defined; flatten it, onto black for edges and poses"
            )
        control = read_clip(
            path, start=self.start, stop=self.stop, stride=self.stride, max_frames=count + 1,
            in_memory=False,
        )  # fmt: skip
        if len(control) != count:
            found = f"only {len(control)}" if len(control) < count else "more"
            raise VideoError(
                f"the control video {path} must have one frame for each of the clip's {count}, "
                f"found {found}; give it the clip's own start, stop and stride"
            )
        height, width = control.frames.shape[-2:]
        if not any(same_aspect((height, width), size) for size in sizes(clip)):
            raise VideoError(
                f"the control video {path} is {width}x{height}, expected the aspect of the clip's "
                f"{sizes(clip)[0][1]}x{sizes(clip)[0][0]}; crop or pad it as the clip was"
            )
        shape = fitted((height, width), clip)

        def image(position: int) -> Float[Tensor, "3 height width"]:
            return shape.apply(control.frame(position))

        return Frames(image, clip.positions, shape.working).made_once().in_memory_if_small()


def sizes(clip: Clip) -> tuple[tuple[int, int], tuple[int, int]]:
    """The size that the clip is shown in, and that which it is worked on in."""
    return clip.display_size, (clip.frames.shape[-2], clip.frames.shape[-1])


def fitted(size: tuple[int, int], clip: Clip) -> Framing:
    """How frames of `size` become the clip's: stretched where it was, else cut to its aspect."""
    display, working = sizes(clip)
    if display != working:
        return Framing(working, working, display)
    cover = max(to / by for to, by in zip(working, size, strict=True))
    scaled = (max(working[0], round(size[0] * cover)), max(working[1], round(size[1] * cover)))
    return Framing(scaled, working, display)


def same_aspect(a: tuple[int, int], b: tuple[int, int]) -> bool:
    """Whether two sizes have the same height over width, but for rounding."""
    return abs(log(a[0] / a[1]) - log(b[0] / b[1])) <= ASPECT
