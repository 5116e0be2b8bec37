"""One server of the page for all tests of it, which notes every connection that it makes."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.video.making import make_video, noise
from tokenflow.app.request import Requests
from tokenflow.app.server import serve
from tokenflow.app.serving import Serving

FRAMES, SIDE = 5, 32
EDIT = {
    "prompt": "a plain red ball on sand", "inversion_prompt": "a plain blue ball on grass",
    "model": "miniature", "editor": "SDEdit", "propagation": "NNField", "steps": 2,
    "max_frames": FRAMES,
}  # fmt: skip


class Served(NamedTuple):
    """A page that is served: its address, its folder, and the other machines that were asked."""

    url: str
    serving: Serving
    asked: list[Any]
    blocks: Any

    @property
    def folder(self) -> Path:
        return Path(self.serving.folder)


@pytest.fixture(autouse=True)
def upload_folder() -> Iterator[None]:
    """Gradio's folder is the environment's: a test's own server leaves it as it was."""
    before = os.environ.get("GRADIO_TEMP_DIR")
    yield
    if before is not None:
        os.environ["GRADIO_TEMP_DIR"] = before


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The page with the embedded model, on a free port."""
    folder, asked = tmp_path_factory.mktemp("app"), list[Any]()
    connect, find = socket.socket.connect, socket.getaddrinfo

    def noted(self: socket.socket, address: Any) -> None:
        if isinstance(address, tuple) and not str(address[0]).startswith(("127.", "::1")):
            asked.append(address)
        connect(self, address)

    def named(host: Any, *args: Any, **options: Any) -> Any:
        if host not in (None, "127.0.0.1", "localhost", "::1"):
            asked.append(host)
        return find(host, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", noted)
        patch.setattr(socket, "getaddrinfo", named)
        serving = Serving(
            str(folder / "runs"), cache=str(folder / "cache"), dtype="float32", device="cpu",
            upload_megabytes=1, max_frames=8, max_resolution=256, max_steps=40,
        )  # fmt: skip
        blocks = serve(serving, block=False)
        yield Served(blocks.local_url, serving, asked, blocks)
        blocks.close(verbose=False)


@pytest.fixture(scope="session")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small clip."""
    return make_video(tmp_path_factory.mktemp("video") / "clip.mp4", noise(FRAMES, SIDE, SIDE))


@pytest.fixture
def requests(tmp_path: Path, video: Path) -> Requests:
    """What checks the requests of a page, with a clip among its uploads."""
    made = Requests(
        Serving(
            str(tmp_path / "runs"), ["miniature", "miniature-lcm"], cache=str(tmp_path / "cache"),
            dtype="float32", device="cpu", max_frames=8, max_resolution=64, max_steps=10,
        )
    )  # fmt: skip
    made.uploads.mkdir(parents=True)
    (made.uploads / "clip.mp4").write_bytes(video.read_bytes())
    return made


def given(requests: Requests, **other: Any) -> dict[str, Any]:
    """What a page sends for an edit."""
    return EDIT | {"video": str(requests.uploads / "clip.mp4")} | other
