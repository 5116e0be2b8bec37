"""What a run keeps, so that it, or another of the same clip, goes on from there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from tokenflow.diffusion import Backbone, Trajectory
from tokenflow.engine.ranks.group import FrameGroup
from tokenflow.storage import digests
from tokenflow.storage.cache import Cache
from tokenflow.video import Clip


@dataclass(frozen=True)
class Recall:
    """Where a run keeps what it has, and what tells its plugins from others.

    Attributes:
        cache: Where.
        editor: The editor with its options, as text. Not given, a sampling is not kept, nor is an
            inversion on which the editor has an influence.
        propagation: The kernel with its options and `Propagation.content`. Not given, a sampling
            is not kept.
        save_every: Steps after which a sampling on its way is kept.
    """

    cache: Cache
    editor: str | None = None
    propagation: str | None = None
    save_every: int = 10


def frame_digests(clip: Clip, each: Callable[[], None] = lambda: None) -> list[str]:
    """Of every frame's values; `each` is called after each frame."""
    found = []
    for frame in clip.frames:
        found.append(digests.of_tensors({"frame": frame}))
        each()
    return found


class KeptInversion:
    """A clip's frames on their way to noise, each kept on its own.

    So every edit of the same frames finds them again, however they are cut into clips and shared
    by ranks.

    Args:
        cache: Where they are kept; nowhere if not given.
        clip: The frames.
        inversion: All else that they depend on.
        content: What an editor shows the model of each frame, `Editor.content`.
        influential: Whether inversion depends on that.
        each: Called after each frame that is read.

    Attributes:
        frames: Digests of the frames and of that content, where they are kept.
    """

    def __init__(
        self,
        cache: Cache | None,
        clip: Clip,
        inversion: Sequence[Any] = (),
        content: Sequence[str] = (),
        influential: bool = False,
        each: Callable[[], None] = lambda: None,
    ) -> None:
        self.cache, self.name = cache, clip.name
        alone = frame_digests(clip, each) if cache is not None else []
        self.frames = list(map(digests.of_values, alone, content))
        seen = self.frames if influential else alone
        self.keys = [digests.of_values("inversion", 3, *inversion, frame) for frame in seen]

    def fill(self, trajectory: Trajectory, here: Int64[Tensor, " some"]) -> bool:
        """Fills in the frames with these numbers; whether all of them were kept."""
        if self.cache is None:
            return False
        for number in here.tolist():
            frame = frame_of(trajectory, number)
            kept = self.cache.load(self.keys[number], partial(alike, frame))
            if kept is None:
                return False
            for name, values in kept.items():
                frame[name].copy_(values)
        return True

    def keep(self, trajectory: Trajectory, here: Int64[Tensor, " some"]) -> None:
        """Keeps the frames with these numbers."""
        if self.cache is None:
            return
        for number in here.tolist():
            tensors = frame_of(trajectory, number)
            self.cache.save(self.keys[number], tensors, "inversion", self.name)


def frame_of(trajectory: Trajectory, number: int) -> dict[str, Tensor]:
    """What is kept of one frame: views of a trajectory's tensors."""
    return {
        "latents": trajectory.latents[:, number],
        "clean": trajectory.clean[number],
        "noisiest": trajectory.noisiest[number],
    }


def alike(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> bool:
    """Whether tensors have the names, shapes and types of others, and finite values."""
    return tensors.keys() == expected.keys() and all(
        (tensor.shape, tensor.dtype) == (expected[name].shape, expected[name].dtype)
        and bool(tensor.isfinite().all())
        for name, tensor in tensors.items()
    )


class KeptSampling:
    """A clip's latents on their way back from noise, of all ranks, kept by the first.

    Args:
        recall: Where, and how often.
        clip: This rank's frames. Its name is part of the key: keyframes are drawn by it.
        frames: Their digests.
        counts: How many frames each rank contributes.
        group: The ranks.
        sampling: All else that the latents depend on.
    """

    def __init__(
        self,
        recall: Recall,
        clip: Clip,
        frames: Sequence[str],
        counts: Sequence[int],
        group: FrameGroup,
        sampling: Sequence[Any],
    ) -> None:
        self.cache, self.every, self.name = recall.cache, recall.save_every, clip.name
        self.positions, self.counts, self.group = clip.positions, counts, group
        own = list(frames[: counts[group.rank]])
        every = [frame for part in group.tell(own) for frame in part]
        self.key = digests.of_values("sampling", 3, clip.name, *sampling, every)

    def load(
        self, begin: Float[Tensor, "frames c h w"], steps: int
    ) -> tuple[int, Float[Tensor, "frames c h w"]] | None:
        """How many of the steps are done, and this rank's latents after them; None to begin anew.

        `begin` are this rank's latents before the first step.
        """
        whole = begin.new_empty(()).expand(sum(self.counts), *begin.shape[1:])
        expected = {"latents": whole, "done": torch.tensor(0)}

        def fits(tensors: Mapping[str, Tensor]) -> bool:
            return alike(expected, tensors) and 0 <= int(tensors["done"]) <= steps

        with self.group.together():
            kept = self.cache.load(self.key, fits) if self.group.rank == 0 else None
        latents = self.group.from_first(None if kept is None else kept["latents"])
        done = self.group.tell(0 if kept is None else int(kept["done"]))[0]
        if latents is None:
            return None
        return done, latents[self.positions.start : self.positions.stop].clone()

    def keep(self, done: int, steps: int, x: Float[Tensor, "frames c h w"]) -> None:
        """Keeps the latents where it is time to: now and then, at the end, and before a stop."""
        if done % self.every and done < steps and not self.group.stopping:
            return
        every: list[Tensor] = []
        self.group.to_first(x, self.counts, every.append)
        with self.group.together():
            if every:
                tensors = {"latents": torch.stack(every), "done": torch.tensor(done)}
                self.cache.save(self.key, tensors, "sampling", self.name)

    def forget(self) -> None:
        """When the result is where it belongs."""
        if self.group.rank == 0:
            self.cache.remove(self.key)


def sampling_of(backbone: Backbone, recall: Recall, settings: Any, *prompts: str) -> list[Any]:
    """What a sampling's latents depend on but the frames: of the settings, all but the batch."""
    chosen = dataclasses.asdict(settings)
    del chosen["batch"]  # changes rounding only: who runs out of memory lowers it and goes on
    return [backbone.fingerprint, recall.editor, recall.propagation, chosen, prompts]
