"""Frames that are not all in memory: decoded on demand, or in a file."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from tempfile import SpooledTemporaryFile

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from tokenflow.storage.scratch import BUDGET, disk

Image = Float[Tensor, "3 height width"]


class Frames:
    """A clip's frames as if they were a tensor (frames, 3, height, width) in host memory.

    It has a shape and a length, and is indexed and walked through as a tensor is; what comes of
    that are tensors, made anew each time. So `frames[:]` is all of them, in memory.

    Args:
        frame: Gives the frame of a number.
        numbers: Those that these are.
        size: Their height and width.
    """

    def __init__(
        self, frame: Callable[[int], Image], numbers: range, size: tuple[int, int]
    ) -> None:
        self.frame, self.numbers = frame, numbers
        self.shape = torch.Size((len(numbers), 3, *size))

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[Image]:
        return map(self.frame, self.numbers)

    def __getitem__(self, which: int | slice | Sequence[int] | Int64[Tensor, " some"]) -> Tensor:
        if isinstance(which, int):
            return self.frame(self.numbers[which])
        numbers = self.numbers[which] if isinstance(which, slice) else pick(self.numbers, which)
        chosen = torch.empty(len(numbers), *self.shape[1:])
        for place, number in zip(chosen, numbers, strict=True):
            place.copy_(self.frame(number))
        return chosen

    def part(self, which: slice) -> Frames:
        """Some of the frames, still not in memory."""
        height, width = self.shape[2:]
        return Frames(self.frame, self.numbers[which], (height, width))

    def in_memory_if_small(self) -> Float[Tensor, "frames 3 height width"] | Frames:
        """All of them as a tensor, if it stays within the budget of memory."""
        return self[:] if 4 * self.shape.numel() <= BUDGET else self

    def made_once(self) -> Frames:
        """The same as 8-bit levels, each made when it is first asked for, and then kept."""
        height, width = self.shape[2:]
        buffer, places = FrameBuffer((height, width)), dict[int, int]()

        def frame(number: int) -> Image:
            if number not in places:
                buffer.append(levels(self.frame(number)))
                places[number] = buffer.count - 1
            return buffer.frame(places[number])

        return Frames(frame, self.numbers, (height, width))


def pick(numbers: range, which: Sequence[int] | Int64[Tensor, " some"]) -> list[int]:
    """Those numbers of a range that a list or a tensor of places names."""
    return [numbers[place] for place in torch.as_tensor(which).tolist()]


BLOCK, MOST = 64 << 20, 1024
"""Bytes, and number, that frames' places are made of at once: memory of its own from the system.

Small tensors that stay, among large ones that come and go, would keep all of that memory.
"""


REACH = 32
"""Frames: more than a window reaches to its keyframes, unless those are unusually far apart."""


class DecodeCache:
    """An LRU cache of decoded frames; on a miss the file is decoded from its beginning.

    It holds up to `budget` bytes. The `REACH` frames before each one are cached with it, if twice
    as many fit: a window's frames are read after its keyframe.

    Args:
        decode: Begins anew: the frames in order, each to be converted only if it is wanted.
        budget: Bytes of frames that stay.
    """

    def __init__(
        self, decode: Callable[[], Iterator[Callable[[], Image]]], budget: int = BUDGET
    ) -> None:
        self.decode, self.budget = decode, budget
        self.walk, self.next = decode(), 0  # nothing is opened before it is needed
        self.kept: OrderedDict[int, Image] = OrderedDict()
        self.places: list[Image] = []
        self.size = 0

    def frame(self, number: int) -> Image:
        """The frame of this number."""
        if number in self.kept:
            self.kept.move_to_end(number)
            return self.kept[number].clone()  # its place may soon be another's
        if number < self.next:
            self.walk, self.next = self.decode(), 0
        one = self.size // max(len(self.kept), 1)
        reach = REACH if 2 * REACH * one <= self.budget else 0
        for convert in self.walk:
            here, self.next = self.next, self.next + 1
            if here == number:
                return self.keep(number, convert())
            if here >= number - reach and here not in self.kept:
                self.keep(here, convert())
        raise IndexError(f"there is no frame {number}")

    @property
    def has_room(self) -> bool:
        """Whether the next frame would stay without another having to go."""
        return self.size + self.size // max(len(self.kept), 1) <= self.budget

    def keep(self, number: int, image: Image) -> Image:
        """Keeps a copy of a frame, and of the others as many as there is room for."""
        if self.kept and self.size + image.nbytes > self.budget:
            _, gone = self.kept.popitem(last=False)
            self.places.append(gone)
            self.size -= gone.nbytes
        if not self.places:
            count = min(max(1, min(BLOCK, self.budget) // image.nbytes), MOST)
            self.places.extend(image.new_empty(count, *image.shape))
        self.kept[number] = self.places.pop().copy_(image)
        self.size += image.nbytes
        return image


class FrameBuffer:
    """Frames as 8-bit levels, kept in memory up to a budget and then in a temporary file.

    The file has no name and goes with the process.

    Args:
        size: Height and width of a frame.
        budget: Bytes that stay in memory.
    """

    def __init__(self, size: tuple[int, int], budget: int = BUDGET) -> None:
        self.size, self.count = size, 0
        self.bytes = 3 * size[0] * size[1]
        self.file = SpooledTemporaryFile(max_size=budget)  # noqa: SIM115 (lives as long as this)

    def extend(self, images: Float[Tensor, "some 3 height width"]) -> None:
        """Adds frames, as `append` does."""
        for image in levels(images):
            self.append(image)

    def append(self, image: UInt8[Tensor, "3 height width"]) -> None:
        """Adds a frame, as its levels.

        Raises:
            InputError: The disk refuses.
        """
        with disk():
            self.file.seek(self.count * self.bytes)
            self.file.write(image.cpu().contiguous().numpy().tobytes())
            self.file.flush()
        self.count += 1

    def frame(self, number: int) -> Image:
        """The frame of this number, in 0..1."""
        self.file.seek(number * self.bytes)
        read = torch.frombuffer(bytearray(self.file.read(self.bytes)), dtype=torch.uint8)
        return read.view(3, *self.size) / 255

    @property
    def frames(self) -> Frames:
        """All that have been added."""
        return Frames(self.frame, range(self.count), self.size)


def described(frames: Tensor | Frames) -> str:
    """The number of frames and their size."""
    return f"{len(frames)} frames of {frames.shape[-1]}x{frames.shape[-2]}"


def levels(
    image: Float[Tensor, "*frames 3 height width"],
) -> UInt8[Tensor, "*frames 3 height width"]:
    """Values in 0..1 (clamped) as 8-bit levels, as files have them."""
    return (image.float().clamp(0, 1) * 255).round().to(torch.uint8)


def luma(frames: Float[Tensor, "*frames 3 height width"]) -> Float[Tensor, "*frames height width"]:
    """The brightness (BT.601) of colours in 0..1, in 0..1."""
    if not frames.is_floating_point():
        raise TypeError(f"expected colours as floats in 0..1, got {frames.dtype}; divide by 255")
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    return (frames * weights.to(frames)).sum(dim=-3)
