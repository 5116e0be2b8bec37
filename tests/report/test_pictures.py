"""Slices, curves and embedded files, by hand."""

from __future__ import annotations

import io
from base64 import b64decode
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.report.making import bar
from tokenflow.report import pictures
from tokenflow.report.pictures import Curve, Plot, Space, distance, slice_rows, slices, warp_errors
from tokenflow.video import resized


def test_a_slice_is_one_row_over_time() -> None:
    frames = torch.rand(5, 3, 8, 6)
    sheet = slices(frames, [1, 6])
    assert sheet.shape == (3, 10, 6)
    for number in range(5):
        assert torch.equal(sheet[:, number], frames[number, :, 1])
        assert torch.equal(sheet[:, 5 + number], frames[number, :, 6])


def test_slices_of_long_and_wide_clips_stay_small() -> None:
    frames = torch.rand(1, 3, 4, 700).expand(2 * pictures.TALLEST + 1, -1, -1, -1)
    height, width = slices(frames, [0, 3]).shape[1:]
    assert height == 2 * len(range(0, len(frames), 3))
    assert width == pictures.WIDEST // 3 < 700


def test_rows_are_spread_over_the_height() -> None:
    assert slice_rows(4) == [0, 1, 2, 3]
    rows = slice_rows(480)
    assert (len(rows), rows[0], rows[-1]) == (24, 10, 470)


def test_distances_are_mean_absolute_differences() -> None:
    frames = torch.zeros(3, 3, 2, 2)
    assert distance(frames, frames + 0.1) == pytest.approx([25.5] * 3)


@pytest.mark.parametrize("size", [(48, 64), (480, 640)])
def test_warp_errors_are_of_what_changes_without_moving(size: tuple[int, int]) -> None:
    height, width = size
    step = width // 64
    spots = torch.rand(3, 9, 14, generator=torch.Generator().manual_seed(0))
    wide = resized(spots, (height, width + 5 * step))
    source = torch.stack([wide[..., step * i : step * i + width] for i in range(6)])
    edited = source / 2
    edited[3] += 0.1
    of_source, of_edit = warp_errors(source, edited)
    assert of_source == [None, *[pytest.approx(0, abs=0.05)] * 5]  # though it moves
    assert of_edit == [None, *[pytest.approx(x, abs=0.05) for x in (0, 0, 10, 10, 0)]]


def test_where_no_pixel_is_seen_in_both_frames_there_is_no_error() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(2, 3, 8, 16, generator=generator)  # smaller than DIS takes, too
    assert len(warp_errors(noise, noise)[0]) == 2


@pytest.mark.parametrize(
    ("largest", "top"), [(0.0, 0.1), (0.07, 0.1), (1.0, 1), (1.1, 2), (4.9, 5), (77.0, 100)]
)
def test_the_upper_edge_of_a_plot_is_round(largest: float, top: float) -> None:
    assert Plot("", "", "", [Curve("", "", [None, largest])]).top == pytest.approx(top)


def test_points_of_a_curve() -> None:
    assert Curve("", "", [None, 5.0, 10.0]).points(10.0) == "500.0,50.00 1000.0,0.00"
    assert Curve("", "", [1.0]).points(1.0) == "0.0,0.00"


def test_a_picture_is_embedded_whole() -> None:
    image = torch.rand(3, 5, 7)
    uri = pictures.picture(image)
    kind, data = uri.split(";base64,")
    assert kind == "data:image/webp"
    levels = torch.frombuffer(
        bytearray(Image.open(io.BytesIO(b64decode(data))).convert("RGB").tobytes()),
        dtype=torch.uint8,
    ).reshape(5, 7, 3)
    assert torch.equal(levels.permute(2, 0, 1), (image * 255).round().byte())


def test_a_video_without_room_is_not_read(tmp_path: Path) -> None:
    """A file of 1 TB, of which the disk has none."""
    with (tmp_path / "huge.mp4").open("wb") as file:
        file.truncate(10**12)
    assert "it has 1000000.0 MB" in Space(1000).file(tmp_path / "huge.mp4").left_out


def test_videos_have_room_until_it_is_used_up(tmp_path: Path) -> None:
    small, large = tmp_path / "small.mp4", tmp_path / "large.mp4"
    small.write_bytes(b"x" * 600)
    large.write_bytes(b"x" * 1001)
    space = Space(1000)
    assert "large.mp4 is left out: it has" in space.file(large).left_out
    assert space.file(small).uri == "data:video/mp4;base64," + "eHh4" * 200
    assert space.file(small).uri is None
    assert space.source(bar(3)).uri is None
