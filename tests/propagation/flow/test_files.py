import os
import struct
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from tokenflow.errors import InputError
from tokenflow.propagation import DIS, FlowFiles, FlowWeighted, NNField
from tokenflow.video import Clip

FRAMES, HEIGHT, WIDTH = 4, 6, 8
CLIP = Clip.from_frames(torch.zeros(FRAMES, 3, HEIGHT, WIDTH))


def constant(x: float, y: float) -> Any:
    return np.broadcast_to(np.float32([x, y]), (HEIGHT, WIDTH, 2)).copy()


def write_flo(file: Path, flow: Any) -> None:
    assert cv2.writeOpticalFlow(str(file), flow)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Between frame i and the next everything moves by (i + 1, -0.5)."""
    for i in range(FRAMES - 1):
        np.save(tmp_path / f"{i:04d}_{i + 1:04d}.npy", constant(i + 1, -0.5))
        write_flo(tmp_path / f"{i + 1}_{i}.flo", constant(-(i + 1), 0.5))
    return tmp_path


def read(folder: Path, start: int, end: int, **options: int) -> torch.Tensor:
    files = FlowFiles(str(folder), **options)
    files.prepare(CLIP)
    return files.between(CLIP, start, end)


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (0, 1, (1, -0.5)),
        (1, 0, (-1, 0.5)),
        (2, 3, (3, -0.5)),
        (0, 3, (6, -1.5)),
        (3, 1, (-5, 1.0)),
    ],
)
def test_flow_is_read_and_chained(
    folder: Path, start: int, end: int, expected: tuple[float, float]
) -> None:
    flow = read(folder, start, end)
    assert flow.shape == (2, HEIGHT, WIDTH)
    assert flow.dtype == torch.float32
    # bilinear samples of a constant, in float32
    assert torch.allclose(flow, torch.tensor(expected)[:, None, None], atol=1e-5)


def test_other_files_have_another_cache_key(folder: Path) -> None:
    def cache_key() -> str:
        return FlowWeighted(FlowFiles(str(folder))).cache_key()

    (folder / "notes.txt").touch()
    before, file = cache_key(), folder / "1_0.flo"
    os.utime(folder / "notes.txt", (1, 1))
    assert cache_key() == before
    write_flo(file, constant(9, 9))
    os.utime(file, (1, 1))
    assert cache_key() != before
    assert FlowWeighted(DIS()).cache_key() == NNField().cache_key() == ""


def test_a_chain_follows_the_point(folder: Path) -> None:
    """Step by step in Python: where the point lands, the next flow is read."""
    first, second = constant(2, 0), np.zeros((HEIGHT, WIDTH, 2), np.float32)
    second[:, :, 0] = np.arange(WIDTH)
    np.save(folder / "0000_0001.npy", first)
    np.save(folder / "0001_0002.npy", second)
    flow = read(folder, 0, 2)
    for x in range(WIDTH):
        assert flow[0, 3, x] == pytest.approx(2 + min(x + 2, WIDTH - 1), abs=1e-5)


def test_a_file_for_a_distant_pair_replaces_the_chain(folder: Path) -> None:
    np.save(folder / "0_3.npy", constant(9, 9))
    assert (read(folder, 0, 3) == 9).all()
    assert read(folder, 3, 0)[0].mean() == pytest.approx(-6, abs=1e-5)


def test_names_may_count_from_another_number(folder: Path, tmp_path: Path) -> None:
    for file in list(folder.iterdir()):
        start, end = file.stem.split("_")
        file.rename(folder / f"{int(start) + 100}_{int(end) + 100}{file.suffix}")
    assert (read(folder, 1, 2, first=100)[0] == 2).all()
    with pytest.raises(InputError, match=r"has no 0_1\.npy or 0_1\.flo"):
        read(folder, 1, 2)


def test_channels_may_come_first(folder: Path) -> None:
    np.save(folder / "0000_0001.npy", np.moveaxis(constant(3, 4), -1, 0))
    assert read(folder, 0, 1)[:, 2, 3].tolist() == [3, 4]


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"flow folder .*none does not exist; expected a folder"):
        FlowFiles(str(tmp_path / "none")).prepare(CLIP)


def test_a_missing_pair_is_named_before_any_work(folder: Path) -> None:
    (folder / "2_1.flo").unlink()
    message = r"has no 2_1\.npy or 2_1\.flo; .* frames 0 to 3, both ways; 1 of 6 files are missing"
    with pytest.raises(InputError, match=message):
        FlowFiles(str(folder)).prepare(CLIP)


def test_two_files_for_a_pair(folder: Path) -> None:
    np.save(folder / "0_1.npy", constant(1, 1))
    with pytest.raises(InputError, match=r"two files for one pair .* 0000_0001\.npy and 0_1\.npy"):
        FlowFiles(str(folder)).prepare(CLIP)


def test_one_frame_needs_no_files(tmp_path: Path) -> None:
    flow = FlowFiles(str(tmp_path))
    flow.prepare(Clip.from_frames(torch.zeros(1, 3, HEIGHT, WIDTH)))
    assert not flow.files


@pytest.mark.parametrize("shape", [(WIDTH, HEIGHT, 2), (HEIGHT, WIDTH), (HEIGHT, WIDTH, 3), (0,)])
def test_another_shape(folder: Path, shape: tuple[int, ...]) -> None:
    np.save(folder / "0000_0001.npy", np.zeros(shape, np.float32))
    with pytest.raises(
        InputError, match=r"0000_0001\.npy is a flow of shape .* expected \(2, 6, 8\)"
    ):
        FlowFiles(str(folder)).prepare(CLIP)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_in_an_array(folder: Path, value: float) -> None:
    flow = constant(1, 1)
    flow[2, 3] = value
    np.save(folder / "0000_0001.npy", flow)
    with pytest.raises(InputError, match=r"0000_0001\.npy has NaN or infinite values in 1 of 48"):
        read(folder, 0, 3)


def test_unknown_motion_in_a_flo_file(folder: Path) -> None:
    flow = constant(1, 1)
    flow[2, 3:5] = [[1e9], [1e10]]  # the mark, and what some write
    write_flo(folder / "1_0.flo", flow)
    with pytest.raises(InputError, match=r"1_0\.flo has NaN or infinite values in 2 of 48"):
        read(folder, 1, 0)


@pytest.mark.parametrize(
    "data",
    [
        b"PI",
        b"PIEH1",
        b"",
        b"\0" * 400,
        struct.pack("<fii", 202021.25, 8, 6),
        struct.pack("<fii", 202021.25, 8, 6) + b"\0" * 385,
        struct.pack("<fii", 202021.25, 1 << 30, 1 << 30),
        struct.pack("<fii", 202021.25, -8, -6) + b"\0" * 384,
    ],
)
def test_a_broken_flo_file(folder: Path, data: bytes) -> None:
    (folder / "1_0.flo").write_bytes(data)
    with pytest.raises(InputError, match=r"1_0\.flo is no complete \.flo file; write it again"):
        read(folder, 1, 0)


def test_a_pickle_is_refused(folder: Path) -> None:
    np.save(folder / "0000_0001.npy", np.array([{"flow": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match=r"0000_0001\.npy is no NumPy array of numbers"):
        read(folder, 0, 1)


def test_an_array_of_words(folder: Path) -> None:
    np.save(folder / "0000_0001.npy", np.array([["left"]]))
    with pytest.raises(InputError, match=r"0000_0001\.npy holds <U4, expected numbers"):
        read(folder, 0, 1)


def test_an_archive_of_arrays(folder: Path) -> None:
    np.savez(folder / "archive.npz", one=constant(1, 1))
    (folder / "archive.npz").rename(folder / "0000_0001.npy")
    with pytest.raises(InputError, match=r"0000_0001\.npy is an archive, expected one array"):
        FlowFiles(str(folder)).prepare(CLIP)


def test_a_broken_archive(folder: Path) -> None:
    (folder / "0000_0001.npy").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(InputError, match=r"0000_0001\.npy is no NumPy array of numbers"):
        FlowFiles(str(folder)).prepare(CLIP)


def test_an_array_that_no_memory_holds(folder: Path) -> None:
    head = {"descr": "<f4", "fortran_order": False, "shape": (10**7, 10**7, 2)}
    with (folder / "0000_0001.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, head)
    with pytest.raises(InputError, match=r"0000_0001\.npy is no NumPy array of numbers"):
        FlowFiles(str(folder)).prepare(CLIP)


def test_a_folder_with_a_files_name(folder: Path) -> None:
    (folder / "0_2.flo").mkdir()
    with pytest.raises(InputError, match=r"0_2\.flo cannot be read: Is a directory"):
        read(folder, 0, 2)
