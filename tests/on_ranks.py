"""Real processes that talk to each other through gloo."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from random import SystemRandom
from typing import Any

import torch
import torch.distributed as dist

import tokenflow.cli.predict
import tokenflow.testing  # noqa: F401 (imported once, by the server that ranks are forked from)
from tokenflow.cli.main import main

PATIENCE = 60.0
"""Seconds in which all ranks must end when one has."""

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])


def on_ranks(
    size: int, folder: Path, function: Callable[..., Any], *args: Any, backend: str = "gloo"
) -> list[Any]:
    """What `function(*args)` returns on each of `size` ranks; AssertionError if one fails."""
    folder.mkdir(parents=True, exist_ok=True)
    processes = [
        CONTEXT.Process(target=_run, args=(rank, size, folder, backend, function, args))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    codes = ended(processes)
    assert codes == [0] * size, f"exit codes of {size} ranks: {codes}"
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


def launched(
    size: int, words: list[str], output: Path | None = None, slurm: bool = False
) -> list[BaseProcess]:
    """The command line on ranks as torchrun or srun starts them, but nobody watches over them.

    What they print is added to `output`.
    """
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{free_port()}"}
    if slurm:
        names = "SLURM_PROCID", "SLURM_LOCALID"
        shared |= {
            "SLURM_NTASKS": f"{size}", "SLURM_NTASKS_PER_NODE": f"{size}", "SLURM_NODEID": "0",
            "SLURM_NNODES": "1", "SLURM_JOB_NAME": "tokenflow", "SLURM_JOB_ID": "7",
        }  # fmt: skip
    else:
        names = "RANK", "LOCAL_RANK"
        shared |= {
            "WORLD_SIZE": f"{size}", "LOCAL_WORLD_SIZE": f"{size}", "TORCHELASTIC_RUN_ID": "test",
            "GROUP_RANK": "0",
        }  # fmt: skip
    ranks = (dict.fromkeys(names, f"{rank}") for rank in range(size))
    options = ["--trainer.accelerator=cpu", f"--trainer.devices={size}", "--trainer.strategy=ddp"]
    return [command([*words, *options], shared | rank, output) for rank in ranks]


def free_port() -> int:
    """A port that is free, and that the system gives to none who asks for any before it is used."""
    for port in SystemRandom().sample(range(20_000, 32_000), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError("found no free port")


def command(words: list[str], environment: dict[str, str], output: Path | None) -> BaseProcess:
    """The command line in a process of its own, begun; its exit code is the command's."""
    process = CONTEXT.Process(target=_command, args=(words, environment, output))
    process.start()
    return process


def ended(processes: list[BaseProcess]) -> list[int | None]:
    """Their exit codes; the last may come `PATIENCE` after the first, or there is none."""
    try:
        wait([process.sentinel for process in processes], 2 * PATIENCE)
        for process in processes:
            process.join(PATIENCE)
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()


def _command(words: list[str], environment: dict[str, str], output: Path | None) -> None:
    torch.set_num_threads(1)
    os.environ.update(environment)
    if output is not None:
        with output.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
    main(words)


def _run(
    rank: int, size: int, folder: Path, backend: str, function: Callable[..., Any], args: Any
) -> None:
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(2 * PATIENCE - 10)
    store = dist.FileStore(str(folder / "store"), size)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    torch.save(function(*args), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    faulthandler.cancel_dump_traceback_later()
