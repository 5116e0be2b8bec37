import pytest
import torch

from tokenflow.video import VideoError, contact_sheet, halves, side_by_side


def numbered(count: int, height: int = 2, width: int = 3) -> torch.Tensor:
    """Frame i is filled with i / 100."""
    return (torch.arange(count) / 100).view(-1, 1, 1, 1).expand(count, 3, height, width)


def test_side_by_side_keeps_both_clips_and_a_white_gap():
    a, b = torch.rand(2, 3, 4, 5), torch.rand(2, 3, 4, 7)
    both = side_by_side(a, b, gap=2)
    assert both.shape == (2, 3, 4, 14)
    assert torch.equal(both[..., :5], a)
    assert torch.equal(both[..., 7:], b)
    assert (both[..., 5:7] == 1).all()


def test_contact_sheet_shows_evenly_spaced_frames_first_and_last_included():
    sheet = contact_sheet([numbered(9), numbered(3)], columns=5, gap=1)
    assert sheet.shape == (3, 2 + 1 + 2, 5 * 3 + 4)
    rows = (sheet[0, 0::3, 0::4] * 100).round().int().tolist()
    # Of 3 frames in 5 columns: positions 0, 0.5, 1, 1.5, 2, with halves to the even neighbour.
    assert rows == [[0, 2, 4, 6, 8], [0, 0, 1, 2, 2]]
    assert (sheet[:, 2] == 1).all()
    assert (sheet[:, :, 3::4] == 1).all()


def test_contact_sheet_of_few_frames_has_few_columns():
    assert contact_sheet([numbered(2)], columns=8, gap=4).shape == (3, 2, 3 + 4 + 3)
    assert contact_sheet([numbered(5)], columns=1).shape == (3, 2, 3)


@pytest.mark.parametrize(("rows", "columns"), [([], 8), ([4], 0), ([4, 0], 8)])
def test_contact_sheet_of_nothing_is_refused(rows, columns):
    with pytest.raises(VideoError, match="at least one column and rows with frames"):
        contact_sheet([numbered(count) for count in rows], columns=columns)


def test_halves_undo_side_by_side():
    a, b = numbered(3), numbered(3) + 1
    back = halves(side_by_side(a, b))
    assert torch.equal(back[0], a)
    assert torch.equal(back[1], b)
