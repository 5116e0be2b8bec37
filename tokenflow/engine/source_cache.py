"""What an edit takes from the source's branch in each step, kept for later edits of the clip.

Correspondences, injected features, and the tokens of injected queries and keys depend on the source
alone: an edit that finds them runs without the source's branch. They are kept by the first edit's
sampling, or recorded before, in inversion.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenflow.engine.ranks.group import FrameGroup
from tokenflow.errors import InputError
from tokenflow.plugins import code_of
from tokenflow.propagation import Correspondence
from tokenflow.storage import digests
from tokenflow.storage.cache import Cache
from tokenflow.storage.scratch import BUDGET, Spill

FRAMES = "#"
"""Stands before the name of a table's frames."""
WRITER = "writer"

Tables = Mapping[str, Tensor]


class SourceCache:
    """Tables of the source's features, one entry for each step.

    In host memory, and beyond a budget in memory-mapped files; or, with a `Cache`, on disk, where
    they are written behind and read ahead of the steps.

    Args:
        cache: Where entries are kept between runs.
        budget: Bytes that stay in memory, where there is no such cache.
    """

    def __init__(self, cache: Cache | None = None, budget: int = BUDGET) -> None:
        self.cache, self.kept = cache, Spill(budget)
        self.entries: dict[str, Tables] = {}
        self.pending: dict[str, Future[Tables | None]] = {}
        self.worker = ThreadPoolExecutor(1) if cache is not None else None
        self.written, self.full = 0, False

    def load(self, key: str) -> Tables | None:
        """An entry, if it is there."""
        if self.cache is None:
            return self.entries.get(key)
        if key in self.pending:
            return self.pending.pop(key).result()
        return self.cache.load(key)

    def has(self, key: str) -> bool:
        """Whether an entry is there; on disk it may be damaged."""
        known = key in self.entries or key in self.pending
        return known or (self.cache is not None and self.cache.path(key).exists())

    def ahead(self, key: str) -> None:
        """Begins to read the entry that is asked for next."""
        if self.cache is not None and self.worker is not None and self.cache.path(key).exists():
            self.pending[key] = self.worker.submit(self.cache.load, key)

    def save(self, key: str, tables: Tables, clip: str) -> None:
        """Keeps an entry; one clip's may take half of a cache's limit."""
        if self.full:
            return
        self.written += size_of(tables)
        if self.cache is None or self.worker is None:
            try:
                self.entries[key] = {name: self.kept.keep(t) for name, t in tables.items()}
            except InputError as error:
                self.stop(clip, str(error))
            return
        if 2 * self.written > self.cache.limit:
            limit = f"they would take more than half of its {self.cache.limit / 1e9:g} GB"
            self.stop(clip, f"{limit}; raise --model.cache_gigabytes")
            return
        self.flush()  # one at a time is in memory
        self.pending[key] = self.worker.submit(self._write, key, tables, clip)

    def stop(self, clip: str, reason: str) -> None:
        """Says why no further step is kept; the edit goes on."""
        self.full = True
        warnings.warn(
            f"the source features of {clip} are not all cached, and edits of the clip compute the "
            f"rest anew: {reason}",
            stacklevel=3,
        )

    def _write(self, key: str, tables: Tables, clip: str) -> None:
        assert self.cache is not None
        self.cache.save(key, tables, "features", clip)

    def flush(self) -> None:
        """Waits for what is being read and written."""
        for key in list(self.pending):
            self.pending.pop(key).result()


class SourceFeatures:
    """The features of one step after the other, of the frames that a rank denoises.

    Where `cached` is true they are of another edit, or recorded in inversion; else this edit's own,
    to be kept.

    Args:
        cache: Where they are kept; None for no cache.
        key: What they depend on besides the step and the layers that are injected.
        writer: This edit's own name: what it has kept itself is not used, so that an edit which
            is resumed or repeated takes the same passes again, bit for bit.
        clip: The clip's name.
        injected: The layers that are injected, of each step; None where nothing is to be kept.
        wanted: Whether the source's own tokens are wanted at a step.
        ranks: That share the clip, and agree.
        recorded: Whether they are recorded in inversion, and sampling takes but adds none.

    Attributes:
        took: Whether others had kept the last step that was looked up, or none was yet.
        alone: Whether none is, for an edit that is resumed and took none before: others may have
            filled the cache since.
    """

    def __init__(
        self,
        cache: SourceCache | None = None,
        key: Sequence[Any] = (),
        writer: str = "",
        clip: str = "clip",
        injected: Sequence[Sequence[str] | None] = (),
        wanted: Callable[[int], bool] = lambda step: False,
        ranks: FrameGroup | None = None,
        recorded: bool = False,
    ) -> None:
        self.recorded = recorded
        self.cache, self.key, self.writer, self.clip = cache, digests.of_values(*key), writer, clip
        self.injected, self.wanted, self.ranks = injected, wanted, ranks or FrameGroup()
        self.tables: Tables = {}
        self.places: dict[str, dict[int, int]] = {}  # of frames in the tables
        self.rows: dict[str, dict[int, Tensor]] = {}
        self.cached = self.known = self.off = False
        self.took, self.alone = cache is not None, False
        self.entry, self.size = "", 0

    def begin(self, step: int, inversion: bool = False) -> None:
        """Looks up a step's features, to take them; in inversion, to record those that lack."""
        if self.cache is None:
            return
        if self.injected[step] is None:
            self.known, self.cached = True, False
            return
        self.entry = self._entry(step)
        found = self.cache.load(self.entry)
        self.known = found is not None or (self.recorded and not inversion)
        if inversion:
            if found is not None:  # counts as if it had been written now: the limit is the same
                self.cache.written += size_of(found)
            return
        mine = self.writer and found is not None and text(found[WRITER]) == self.writer
        own = found is None or (not self.recorded and (mine or self.alone))
        own, wanted = self.ranks.any(bool(own), self.wanted(step))
        self.took = not own
        self.cached = not (own or wanted)
        self.tables = found if found and self.cached else {}
        self.places = {
            name.removeprefix(FRAMES): {frame: row for row, frame in enumerate(frames.tolist())}
            for name, frames in self.tables.items()
            if name.startswith(FRAMES)
        }
        if self.cached and step + 1 < len(self.injected):
            self.cache.ahead(self._entry(step + 1))

    def complete(self) -> bool:
        """Whether all that may be kept is there, on every rank."""
        lacking = [
            step
            for step, layers in enumerate(self.injected)
            if not (layers is None or self.cache is None or self.cache.has(self._entry(step)))
        ]
        (some,) = self.ranks.any(bool(lacking))
        return not some

    def _entry(self, step: int) -> str:
        return digests.of_values("source features", 1, self.key, step, self.injected[step])

    def end(self) -> None:
        """Keeps what was recorded in the step."""
        if self.cache is not None and not (self.known or self.off):
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()  # the rows are on their way to host memory
            tables = {WRITER: torch.tensor(list(self.writer.encode()), dtype=torch.uint8)}
            for name, rows in self.rows.items():
                if len({row.shape for row in rows.values()}) == 1:
                    tables[FRAMES + name] = torch.tensor(list(rows))
                    tables[name] = torch.stack(list(rows.values()))
            if len(tables) == 1 + 2 * len(self.rows):  # a kernel's number of taps may vary
                self.cache.save(self.entry, tables, self.clip)
        self.rows, self.tables, self.cached, self.size = {}, {}, False, 0

    def close(self) -> None:
        """Waits until everything is written."""
        if self.cache is not None:
            self.cache.flush()

    @property
    def recording(self) -> bool:
        """Whether rows of the step are to be kept."""
        return not (self.cache is None or self.known or self.off or self.cache.full)

    def keep(self, name: str, frames: Sequence[int], values: Tensor) -> None:
        """Records a row for each of some frames, by position in the clip."""
        if not self.recording:
            return
        rows = self.rows.setdefault(name, {})
        if rows.keys() >= set(frames):
            return
        own = values.to("cpu", copy=True, non_blocking=True)
        rows.update(zip(frames, own, strict=True))
        self.size += own.nbytes
        if self.size > BUDGET:
            self.off, self.rows = True, {}
            warnings.warn(
                f"the source features of {self.clip} take more than {BUDGET >> 30} GiB a step, and "
                f"are not kept: edits of the clip compute them anew; leave record_source out",
                stacklevel=2,
            )

    def has(self, name: str) -> bool:
        """Whether there are cached rows of this name."""
        return name in self.tables

    def take(self, name: str, frames: Sequence[int], like: Tensor) -> Tensor:
        """The cached rows of some frames, on another tensor's device."""
        places = self.places[name]
        rows = self.tables[name][[places[frame] for frame in frames]]
        return rows.to(like.device, non_blocking=True)

    def keep_correspondence(
        self, site: str, frames: Sequence[int], found: Correspondence, first: int
    ) -> None:
        """Records a correspondence whose keyframes are counted from token `first` of the clip's."""
        if not self.recording:
            return
        indices = (found.indices + first).to(torch.int32)
        weights = found.weights
        if weights.stride(1) == 0 or weights.shape[1] == 1:  # the same for all tokens
            weights = weights[:, :1]
        self.keep(f"indices/{site}", frames, indices)
        self.keep(f"weights/{site}", frames, weights)

    def correspondence(
        self, site: str, frames: Sequence[int], first: int, like: Tensor
    ) -> Correspondence:
        """A cached correspondence, into keyframes that begin with token `first` of the clip's."""
        indices = self.take(f"indices/{site}", frames, like) - first
        weights = self.take(f"weights/{site}", frames, like)
        return Correspondence(indices, weights.expand(indices.shape))


def size_of(tables: Tables) -> int:
    """Bytes."""
    return sum(table.nbytes for table in tables.values())


def text(values: Tensor) -> str:
    """What a tensor of bytes says."""
    return bytes(values.tolist()).decode()


def described(plugin: object) -> Any:
    """A plugin's class and options for a cache key.

    None where an option is not an attribute of its name, or no plain value, path or plugin.
    """
    try:
        names = signature(type(plugin)).parameters
    except ValueError:  # of a type that is not Python's, such as a tensor
        return None
    values = {}
    for name in names:
        value = getattr(plugin, name, ...)
        if isinstance(value, Path):
            value = str(value)
        elif not (value is None or isinstance(value, bool | int | float | str)):
            value = described(value) if hasattr(value, "__dict__") else None
            if value is None:
                return None
        values[name] = value
    kind = type(plugin)
    return [f"{kind.__module__}.{kind.__qualname__}", code_of(kind), values]
