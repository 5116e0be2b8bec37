"""How metrics are shown in tables: a heading, a unit, which way is better, digits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Column(NamedTuple):
    """How a metric is shown: a heading, its unit, what it is multiplied by, digits.

    An arrow in the unit says whether higher or lower is better.
    """

    heading: str
    unit: str
    factor: float = 1
    digits: int = 3

    def text(self, value: float | None) -> str:
        """A value in the table's unit."""
        if value is None or math.isnan(value):
            return "–"
        return f"{value * self.factor:.{self.digits}f}"


COLUMNS = {
    "flicker": Column("flicker", "share"),
    "flicker_source": Column("source's flicker", "share"),
    "psnr": Column("PSNR", "dB ↑", digits=2),
    "ssim": Column("SSIM", "↑"),
    "structure": Column("structure", "↑"),
    "structure_outside": Column("structure outside", "↑"),
    "psnr_outside": Column("PSNR outside", "dB ↑", digits=2),
    "lpips": Column("LPIPS", "↓"),
    "clip_text": Column("CLIP text", "↑"),
    "clip_frames": Column("CLIP frames", "↑"),
    "judge_edited": Column("edited", "share ↑"),
    "judge_kept": Column("kept", "share ↑"),
}


def column(name: str) -> Column | None:
    """How a metric is shown; none for those that only files have."""
    kind, _, distance = name.rpartition("_")
    if kind == "warp_error":
        return Column(f"warp error, {distance} apart", "x 1000 ↓", 1000, 2)
    return COLUMNS.get(name)


def best(
    name: str, values: Sequence[float | None], all_of: Mapping[str, Sequence[object]]
) -> set[int]:
    """The places of the best values of a metric, by what is shown; none where all are alike.

    Flicker is best where it is nearest to its source's.
    """
    shown, source = column(name), all_of.get("flicker_source")
    if shown is None:
        return set()
    if "↑" in shown.unit:
        cost = [None if v is None else -v for v in values]
    elif "↓" in shown.unit:
        cost = list(values)
    elif name == "flicker" and source is not None:
        cost = [
            abs(v - w) if v is not None and isinstance(w, float) else None
            for v, w in zip(values, source, strict=True)
        ]
    else:
        return set()
    known = [c for c in cost if c is not None and not math.isnan(c)]
    least = min(known, default=math.nan)
    if len(known) < 2 or len({shown.text(c) for c in known}) < 2:
        return set()
    return {n for n, c in enumerate(cost) if c is not None and shown.text(c) == shown.text(least)}
