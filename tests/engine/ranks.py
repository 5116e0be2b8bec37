"""Real processes that talk to each other through gloo."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import tokenflow.prediction
import tokenflow.testing  # noqa: F401 (imported once, by the server that ranks are forked from)
from tokenflow.cli import main

PATIENCE = 120.0
"""Seconds until ranks that do not end are ended."""

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])


def on_ranks(size: int, folder: Path, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What `function(*args)` returns on each of `size` ranks; AssertionError if one fails."""
    folder.mkdir(parents=True, exist_ok=True)
    processes = [
        CONTEXT.Process(target=_run, args=(rank, size, folder, function, args))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * size, f"exit codes of {size} ranks: {codes}"
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


def command(words: list[str], environment: dict[str, str]) -> BaseProcess:
    """The command line in a process of its own, already started; its exit code is the command's."""
    process = CONTEXT.Process(target=_command, args=(words, environment))
    process.start()
    return process


def _command(words: list[str], environment: dict[str, str]) -> None:
    torch.set_num_threads(1)
    os.environ.update(environment)
    main(words)


def _run(rank: int, size: int, folder: Path, function: Callable[..., Any], args: Any) -> None:
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(PATIENCE - 10)
    store = dist.FileStore(str(folder / "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    torch.save(function(*args), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    faulthandler.cancel_dump_traceback_later()
