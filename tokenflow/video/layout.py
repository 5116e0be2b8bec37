"""Pictures made of clips, to look at clips together."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from tokenflow.video.clip import VideoError
from tokenflow.video.frames import Frames
from tokenflow.video.sizing import Size, resized

WHITE = 1.0
GAP = 4


def side_by_side(
    a: Float[Tensor, "*frames 3 height width_a"],
    b: Float[Tensor, "*frames 3 height width_b"],
    *,
    gap: int = GAP,
) -> Float[Tensor, "*frames 3 height width"]:
    """Two frames, or all of two clips, next to each other, `gap` white pixels between them."""
    return torch.cat([pad(a, (0, gap), value=WHITE), b], dim=-1)


def both_sides(size: Size) -> Size:
    """What `side_by_side` makes of two frames of this size."""
    return size[0], 2 * size[1] + GAP


def halves(
    both: Float[Tensor, "*frames 3 height both_widths"], *, gap: int = GAP
) -> tuple[Float[Tensor, "*frames 3 height width"], Float[Tensor, "*frames 3 height width"]]:
    """The two frames or clips of one width that `side_by_side` has put next to each other."""
    width = (both.shape[-1] - gap) // 2
    return both[..., :width], both[..., -width:]


def contact_sheet(
    rows: Sequence[Float[Tensor, "_ 3 height width"] | Frames],
    columns: int = 8,
    *,
    size: Size | None = None,
    gap: int = GAP,
) -> Float[Tensor, "3 sheet_height sheet_width"]:
    """One row for each clip, of frames spaced evenly from its first to its last.

    A sheet has at most as many columns as the longest clip has frames. They are scaled to `size`,
    if one is given. VideoError for no rows, an empty clip or less than one column.
    """
    if not rows or columns < 1 or any(len(row) == 0 for row in rows):
        raise VideoError(
            f"expected at least one column and rows with frames, got {columns} columns "
            f"and rows of {[len(row) for row in rows]} frames."
        )
    columns = min(columns, max(len(row) for row in rows))
    strips = []
    for row in rows:
        chosen = torch.linspace(0, len(row) - 1, columns).round().long()
        cells = [image if size is None else resized(image, size) for image in row[chosen]]
        strips.append(torch.cat([pad(cell, (0, gap, 0, gap), value=WHITE) for cell in cells], -1))
    sheet = torch.cat(strips, dim=-2)
    return sheet[:, : sheet.shape[1] - gap, : sheet.shape[2] - gap]
