"""What an interrupted run, or another edit of the same clip, resumes from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
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
class ResumeStore:
    """The cache of a run, and the cache keys of its plugins.

    Attributes:
        cache: Holds inversions and sampling checkpoints.
        editor: The editor with its options, as text. If None, there are no checkpoints, and
            inversions that the editor conditions are not cached.
        propagation: The kernel with its options and its `cache_key`, as text. If None, there are no
            checkpoints.
        save_every: Sampling steps between two checkpoints; None for no checkpoints.
        source: Whether the source's features are cached, for later edits of the same clip.
    """

    cache: Cache
    editor: str | None = None
    propagation: str | None = None
    save_every: int | None = 10
    source: bool = True

    @property
    def checkpoints(self) -> bool:
        """Whether samplings are resumed."""
        return None not in (self.editor, self.propagation, self.save_every)


def frame_digests(clip: Clip) -> list[str]:
    """Of every frame's values."""
    return [digests.of_tensors({"frame": frame}) for frame in clip.frames]


class CachedInversion:
    """The inversion of a clip's frames, each cached on its own.

    So every edit of the same frames finds them, whatever clip and rank they belong to.

    Args:
        cache: Where they are; None for no cache.
        clip: The frames.
        inversion: The other parts of the cache key.
        content: The editor's `cache_key` of each frame.
        conditioned: Whether the inversion depends on that.
        given: Digests of what the model is given beside each frame's latents, if anything is.

    Attributes:
        frames: Digests of all that is each frame's own; none without a cache.
    """

    def __init__(
        self,
        cache: Cache | None,
        clip: Clip,
        inversion: Sequence[Any] = (),
        content: Sequence[str] = (),
        conditioned: bool = False,
        given: Sequence[str] = (),
    ) -> None:
        self.cache, self.name = cache, clip.name
        alone = frame_digests(clip) if cache is not None else []
        if given:
            alone = list(map(digests.of_values, alone, given))
        self.frames = list(map(digests.of_values, alone, content))
        seen = self.frames if conditioned else alone
        self.keys = [digests.of_values("inversion", 4, *inversion, frame) for frame in seen]

    def fill(self, trajectory: Trajectory, here: Int64[Tensor, " some"]) -> bool:
        """Fills in the frames with these numbers; False if one is not cached."""
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
        """Caches the frames with these numbers."""
        if self.cache is None:
            return
        for number in here.tolist():
            tensors = frame_of(trajectory, number)
            self.cache.save(self.keys[number], tensors, "inversion", self.name)


def frame_of(trajectory: Trajectory, number: int) -> dict[str, Tensor]:
    """What is cached of one frame: views of a trajectory's tensors."""
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


class SamplingCheckpoint:
    """The latents of a sampling in progress, of all ranks, written by rank 0.

    Args:
        store: Where, and how often.
        clip: This rank's frames. The clip's name is part of the key: keyframes are drawn by it.
        frames: Their digests.
        counts: How many frames each rank contributes.
        ranks: That share the clip.
        sampling: The other parts of the cache key.
    """

    def __init__(
        self,
        store: ResumeStore,
        clip: Clip,
        frames: Sequence[str],
        counts: Sequence[int],
        ranks: FrameGroup,
        sampling: Sequence[Any],
    ) -> None:
        self.cache, self.every, self.name = store.cache, store.save_every or 1, clip.name
        self.positions, self.counts, self.ranks = clip.positions, counts, ranks
        own = list(frames[: counts[ranks.rank]])
        every = [frame for part in ranks.all_gather_object(own) for frame in part]
        self.key = digests.of_values("sampling", 7, clip.name, *sampling, every)

    def load(
        self, begin: Float[Tensor, "frames c h w"], steps: int
    ) -> tuple[Float[Tensor, "frames c h w"], int, bool] | None:
        """This rank's latents, the steps that are done, and whether the last one took the source's
        features from the cache; None without a checkpoint.

        `begin` are this rank's latents before the first step, `steps` those of the schedule.
        """
        whole = begin.new_empty(()).expand(sum(self.counts), *begin.shape[1:])
        expected = {"latents": whole, "done": torch.tensor(0), "took": torch.tensor(False)}

        def fits(tensors: Mapping[str, Tensor]) -> bool:
            return alike(expected, tensors) and 0 <= int(tensors["done"]) <= steps

        with self.ranks.together():
            found = self.cache.load(self.key, fits) if self.ranks.rank == 0 else None
        latents = self.ranks.broadcast(None if found is None else found["latents"])
        state = None if found is None else (int(found["done"]), bool(found["took"]))
        state = self.ranks.all_gather_object(state)[0]
        if latents is None or state is None:
            return None
        return latents[self.positions.start : self.positions.stop].clone(), *state

    def save(self, done: int, x: Float[Tensor, "frames c h w"], took: bool) -> None:
        """Writes the latents after so many steps, and whether the last one took from the cache."""
        every: list[Tensor] = []
        self.ranks.gather(x, self.counts, every.append)
        with self.ranks.together():
            if every:
                state = {"done": torch.tensor(done), "took": torch.tensor(took)}
                tensors = {"latents": torch.stack(every), **state}
                self.cache.save(self.key, tensors, "sampling", self.name)

    def remove(self) -> None:
        """Deletes it, once the result is written."""
        if self.ranks.rank == 0:
            self.cache.remove(self.key)


def sampling_key(model: Backbone, store: ResumeStore, settings: Any, *prompts: str) -> list[Any]:
    """What a sampling's latents depend on besides the frames."""
    chosen = dataclasses.asdict(settings)
    for name in UNIMPORTANT:
        del chosen[name]
    own = dataclasses.astuple(model.defaults)
    return [model.fingerprint, own, store.editor, store.propagation, chosen, prompts]


UNIMPORTANT = ("batch", "report_reconstruction")
"""Settings that change rounding or reports only: who runs out of memory lowers the batch."""
