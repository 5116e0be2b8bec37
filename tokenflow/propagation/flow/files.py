"""Optical flow that was computed elsewhere, read from a folder."""

from __future__ import annotations

import re
import struct
from functools import reduce
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tokenflow.errors import InputError
from tokenflow.propagation.flow.base import OpticalFlow, require_flow, warp
from tokenflow.storage import digests
from tokenflow.storage.paths import local
from tokenflow.video import Clip

NAME = re.compile(r"(\d+)_(\d+)\.(npy|flo)")
FLO = 202021.25
"""What a .flo file begins with: its magic number, as Middlebury defined it."""


class FlowFiles(OpticalFlow):
    """A folder with one file for each pair of frames, `START_END.npy` or `START_END.flo`.

    The names are frame numbers, with or without leading zeros: `0003_0004.flo` says where the
    points of frame 3 are in frame 4. Needed is the flow of neighbouring frames, forwards
    (`3_4`) and backwards (`4_3`); over longer distances it is chained. A file for a distant pair
    (`3_9`) is used in place of the chain. Arrays are (height, width, 2) or (2, height, width)
    with x, then y, in pixels, of the size at which the clip is edited, or, to measure it, of the
    run's videos; these differ where a video's sides are no multiples of what the model needs.

    Args:
        folder: Where the files are.
        first: The number that the names give to the clip's first frame.
    """

    measures_frames = False

    def __init__(self, folder: str, first: int = 0) -> None:
        self.folder, self.first = local(folder), first
        self.files: dict[tuple[int, int], Path] = {}

    def prepare(self, clip: Clip) -> None:
        """Finds the files, that each frame is joined to the next, and reads the first."""
        if not self.folder.is_dir():
            raise InputError(
                f"the flow folder {self.folder} does not exist; expected a folder with files "
                f"like 0000_0001.npy and 0001_0000.npy"
            )
        self.files = {}
        for file in sorted(self.folder.iterdir()):
            if name := NAME.fullmatch(file.name):
                pair = int(name[1]) - self.first, int(name[2]) - self.first
                if pair in self.files:
                    raise InputError(
                        f"{self.folder} has two files for one pair of frames, "
                        f"{self.files[pair].name} and {file.name}; keep one of them"
                    )
                self.files[pair] = file
        steps = [(i, i + 1) for i in clip.positions[:-1]]
        missing = [p for i, j in steps for p in ((i, j), (j, i)) if p not in self.files]
        if missing:
            start, end = (number + self.first for number in missing[0])
            raise InputError(
                f"{self.folder} has no {start}_{end}.npy or {start}_{end}.flo; expected the flow "
                f"between neighbouring frames {self.first} to {self.first + clip.total - 1}, both "
                f"ways; {len(missing)} of {2 * len(steps)} files are missing"
            )
        if steps:
            self.read(clip, *steps[0])  # files of another size are all so

    def cache_key(self) -> str:
        """The files' names, sizes and times of change: they may be many gigabytes."""
        states = [(f.name, f.stat()) for f in self.folder.glob("*") if NAME.fullmatch(f.name)]
        return digests.of_values(sorted((n, s.st_size, s.st_mtime_ns) for n, s in states))

    def between(self, clip: Clip, start: int, end: int) -> Float[Tensor, "2 height width"]:
        if not self.files:
            self.prepare(clip)
        if (start, end) in self.files:
            return self.read(clip, start, end)
        way = 1 if end > start else -1
        steps = [self.read(clip, i, i + way) for i in range(start, end, way)]
        return reduce(lambda so_far, step: so_far + warp(step, so_far), steps)

    def read(self, clip: Clip, start: int, end: int) -> Float[Tensor, "2 height width"]:
        """One file's flow, checked."""
        file = self.files[start, end]
        array = read_flo(file) if file.suffix == ".flo" else read_npy(file)
        if array.ndim == 3 and array.shape[-1] == 2 and array.shape[0] != 2:
            array = np.moveaxis(array, -1, 0)
        if array.dtype.kind not in "fiu":
            raise InputError(f"{file} holds {array.dtype}, expected numbers; write it again")
        flow = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
        require_flow(flow, clip, str(file))
        return flow


def read_npy(file: Path) -> np.ndarray:
    """An array of numbers; a pickle is refused."""
    try:
        array = np.load(file, allow_pickle=False)
    except (ValueError, EOFError, OSError, MemoryError, BadZipFile) as error:
        raise InputError(f"{file} is no NumPy array of numbers: {error}; write it again") from error
    if not isinstance(array, np.ndarray):  # an archive of several
        raise InputError(f"{file} is an archive, expected one array; write it with numpy.save")
    return array


def read_flo(file: Path) -> np.ndarray:
    """Middlebury's format: a magic number, width, height, then x and y of each pixel.

    Not by cv2.readOpticalFlow, which ends the process where the header has a negative size.
    """
    try:
        data = file.read_bytes()
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}; write it again") from error
    magic, width, height = struct.unpack("<fii", data[:12].ljust(12, b"\0"))
    if magic != FLO or min(width, height) < 1 or len(data) != 12 + 8 * width * height:
        raise InputError(
            f"{file} is no complete .flo file; write it again, for example with "
            f"cv2.writeOpticalFlow"
        )
    flow = np.frombuffer(data[12:], "<f4").reshape(height, width, 2)
    # Middlebury marks pixels whose motion is not known with 1e9 and more
    return np.where(np.abs(flow) >= 1e9, np.nan, flow)
