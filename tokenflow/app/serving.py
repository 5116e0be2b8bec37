"""What the command line says of the page: where it is served, what it may use, its limits."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from tokenflow.errors import InputError
from tokenflow.storage.paths import FOLDER

LOCAL = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Serving:
    """How the page is served; nothing here can be changed from it.

    Args:
        folder: Runs go to folders in this one, and uploads to `.uploads` in it.
        models: The models that the page offers: the embedded ones, "miniature", "miniature-lcm"
            and "miniature-transformer", folders in diffusers' layout, hub ids, checkpoints in one
            *.safetensors file.
        host: The address that is listened at; any other than this machine's own needs a password.
        port: The first free one from 7860 if not given.
        share: Makes a public address by Gradio's tunnel, which needs a password.
        password: What the page asks for, with the user name "tokenflow"; better given as the
            environment's TOKENFLOW_APP_PASSWORD, as others can see a command line.
        upload_megabytes: The largest file that can be uploaded.
        max_frames: The most frames of a clip that an edit takes.
        max_resolution: The most pixels of a frame's shorter side; in all, twice its square.
        max_steps: The most steps of sampling, and of inversion.
        max_waiting: The most edits that wait for the one that runs.
        cache: As --model.cache of predict, which may be the same folder; null for none.
        device: Where models run: "cpu", "cuda" or another of Lightning's; "auto" takes an
            accelerator if there is one.
        dtype: Of the networks, as --model.dtype of predict.
        open: Whether to open the page in the browser.
    """

    folder: str = "runs"
    models: Sequence[str] = ("miniature", "miniature-lcm", "miniature-transformer")
    host: str = "127.0.0.1"
    port: int | None = None
    share: bool = False
    password: str | None = None
    upload_megabytes: int = 200
    max_frames: int = 120
    max_resolution: int = 768
    max_steps: int = 200
    max_waiting: int = 8
    cache: str | None = FOLDER
    device: str = "auto"
    dtype: str = "auto"
    open: bool = False

    def __post_init__(self) -> None:
        if not self.models:
            raise InputError("--models is empty; name at least one, such as miniature")
        for name in ("upload_megabytes", "max_frames", "max_resolution", "max_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} must be at least 1, got {getattr(self, name)}")
        if self.port is not None and not 0 < self.port < 2**16:
            raise InputError(f"--port must be from 1 to 65535, got {self.port}")
        if self.max_waiting < 0:
            raise InputError(f"--max_waiting must be at least 0, got {self.max_waiting}")
        if not self.password and (self.share or self.host not in LOCAL):
            what = "--share" if self.share else f"--host {self.host}"
            raise InputError(
                f"{what} lets others reach the page, expected a --password for it and got none; "
                f"give one, or TOKENFLOW_APP_PASSWORD in the environment"
            )

    def admits(self, user: str, password: str) -> bool:
        """Whether these are the page's user and password."""
        given, expected = (text.encode() for text in (password, self.password or ""))
        return user == "tokenflow" and secrets.compare_digest(given, expected)
