"""What the rest of tokenflow knows of a video: a clip's frames, their times, its sound."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate

from tokenflow.errors import InputError
from tokenflow.video.frames import Frames

MAX_RATE = 1000  # frames per second; beyond, times are finer than files keep them


class VideoError(InputError):
    """A video, an image folder or a request for one that cannot be served."""


@dataclass(frozen=True)
class AudioSpan:
    """The part of a file's sound that belongs to a clip.

    path: the file whose default audio stream is meant.
    start, stop: presentation times in that file, in seconds.
    state: the file's size and time of change when the clip was read, if they are to be compared.
    """

    path: Path
    start: Fraction
    stop: Fraction
    state: tuple[int, int] | None = None


def file_state(path: Path) -> tuple[int, int] | None:
    """A file's size and time of change, which differ where it was written again."""
    try:
        state = path.stat()
    except OSError:
        return None
    return state.st_size, state.st_mtime_ns


@dataclass(frozen=True, eq=False)
class Clip:
    """One video to edit, or some consecutive frames of it; `len(clip)` is its number of frames.

    frames: RGB, float32, 0..1, upright, in square pixels; a tensor, or `Frames`, which are indexed
        and walked through as one but are not all in memory.
    times: when each frame is shown, in seconds from the whole clip's first; they increase.
    rate: nominal frames per second, greater than 0 and at most 1000.
    name: the file's stem, or the folder's name.
    display_size: (height, width) that videos made from this clip should have.
    audio: the sound that belongs to the whole clip, if there is any.
    first: the position of frames[0] in the whole clip.
    whole: how many frames the whole clip has; as many as this one if not given.
    end: when the last frame goes, in seconds as `times`; 1/rate after it came if not given.

    Raises VideoError for no frames, or times that do not fit them.
    """

    frames: Float[Tensor, "frames 3 height width"] | Frames
    times: tuple[Fraction, ...]
    rate: Fraction
    name: str
    display_size: tuple[int, int]
    audio: AudioSpan | None = None
    first: int = 0
    whole: int | None = None
    end: Fraction | None = None

    def __post_init__(self) -> None:
        if len(self.frames) == 0:
            raise VideoError(f"clip {self.name!r} has no frames; give at least one.")
        check_rate(self.rate, f"clip {self.name!r}")
        check_times(self.times, len(self.frames), f"clip {self.name!r}", self.end)
        if self.first == 0 and self.times[0] != 0:
            raise VideoError(f"clip {self.name!r}: times must start at 0, not at {self.times[0]}.")
        if not 0 <= self.first <= self.total - len(self):
            raise VideoError(
                f"clip {self.name!r}: expected frames {self.first} to {self.positions[-1]} to be "
                f"some of the whole clip's, which has {self.total}."
            )

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def total(self) -> int:
        """How many frames the whole clip has."""
        return len(self.frames) if self.whole is None else self.whole

    @property
    def positions(self) -> range:
        """Where these frames are in the whole clip."""
        return range(self.first, self.first + len(self.frames))

    def frame(self, position: int) -> Float[Tensor, "3 height width"]:
        """The frame at a position in the whole clip."""
        return self.frames[self.positions.index(position)]

    def reduced(self, factor: int) -> "Clip":
        """With frames of their means over `factor` × `factor` pixels, made when asked for."""
        if factor == 1:
            return self
        frames, (height, width) = self.frames, (side // factor for side in self.frames.shape[-2:])
        small = Frames(
            lambda number: interpolate(frames[number][None], (height, width), mode="area")[0],
            range(len(frames)),
            (height, width),
        )
        return dataclasses.replace(self, frames=small.made_once())

    def part(self, positions: range) -> "Clip":
        """The frames at consecutive positions in the whole clip, which this one must have."""
        if positions == self.positions:
            return self
        if positions[0] not in self.positions or positions[-1] not in self.positions:
            raise VideoError(
                f"clip {self.name!r} has frames {self.first} to {self.positions[-1]} of "
                f"{self.total}, asked for {positions[0]} to {positions[-1]}."
            )
        at = self.positions.index(positions[0])
        chosen = slice(at, at + len(positions))
        frames = self.frames
        return dataclasses.replace(
            self,
            frames=frames.part(chosen) if isinstance(frames, Frames) else frames[chosen],
            times=self.times[chosen],
            first=positions[0],
            whole=self.total,
            end=(*self.times, self.end)[chosen.stop],
        )

    @classmethod
    def from_frames(
        cls,
        frames: Float[Tensor, "frames 3 height width"],
        rate: Fraction = Fraction(8),
        name: str = "clip",
    ) -> "Clip":
        """A silent clip of evenly spaced frames, to be shown at their own size.

        Raises VideoError for frames that are no colours, such as 8-bit levels.
        """
        kind, shape = frames.dtype, tuple(frames.shape)
        if not (frames.is_floating_point() and frames.ndim == 4 and shape[1] == 3):
            raise VideoError(
                f"clip {name!r}: expected a tensor of floats of shape (frames, 3, height, width), "
                f"got {kind} of {shape}; divide 8-bit levels by 255."
            )
        if len(frames) and frames.max() > 2:  # resampling overshoots a little
            raise VideoError(
                f"clip {name!r}: expected colours from 0 to 1, got {frames.max():.4g} at most; "
                f"divide 8-bit levels by 255."
            )
        check_rate(rate, f"clip {name!r}")
        times = tuple(index / rate for index in range(len(frames)))
        height, width = frames.shape[-2:]
        return cls(frames, times, rate, name, (height, width))


def check_rate(rate: Fraction, what: str) -> None:
    """Raise VideoError unless files keep so many frames per second."""
    if not 0 < rate <= MAX_RATE:
        raise VideoError(
            f"{what}: expected a rate greater than 0 and at most {MAX_RATE} frames per second, "
            f"got {rate}."
        )


def check_times(
    times: Sequence[Fraction], count: int, what: str, end: Fraction | None = None
) -> None:
    """Raise VideoError unless there are `count` times, from 0 on, increasing, and then the end."""
    if len(times) != count:
        raise VideoError(f"{what}: expected one time for each of {count} frames, got {len(times)}.")
    for index, time in enumerate(times):
        if time < 0 or (index > 0 and time <= times[index - 1]):
            raise VideoError(
                f"{what}: expected times that are not negative and increase, got "
                f"{', '.join(str(t) for t in times[max(0, index - 1) : index + 1])} s "
                f"up to frame {index}."
            )
    if end is not None and end <= times[-1]:
        raise VideoError(f"{what}: expected an end after {times[-1]} s, the last time, got {end}.")
