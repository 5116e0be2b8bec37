"""Requests to stop: their handlers, blocks that they end, and meetings of ranks."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import sleep

import pytest
from lightning.pytorch import Trainer
from torch.distributed import TCPStore

from tokenflow.editors import PnP
from tokenflow.engine.lightning.data import Video
from tokenflow.engine.lightning.module import TokenFlowModule
from tokenflow.engine.lightning.run_writer import RunWriter
from tokenflow.engine.ranks.preemption import SIGNALS, Preemption
from tokenflow.errors import Preempted
from tokenflow.propagation import NNField
from tokenflow.testing import tiny_clip
from tokenflow.video import write_clip


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_an_interruptible_block_at_once(number: int) -> None:
    preemption, before, done = Preemption(), signal.getsignal(number), list[str]()

    def work() -> None:
        try:
            done.append("begins")
            signal.raise_signal(number)
            done.append("goes on")
        finally:
            signal.raise_signal(number)  # does not interrupt what cleans up
            done.append("cleans up")

    preemption.install()
    try:
        for _ in range(2):  # the second one does not begin
            with pytest.raises(Preempted) as stopped, preemption.interruptible():
                work()
            assert stopped.value.code == 75
        assert done == ["begins", "cleans up"]
    finally:
        preemption.close()
    assert signal.getsignal(number) == before


def test_outside_of_a_block_a_signal_is_noted() -> None:
    preemption = Preemption()
    preemption.install()
    try:
        assert not preemption.requested
        signal.raise_signal(signal.SIGTERM)
        assert preemption.requested
    finally:
        preemption.close()


@pytest.mark.parametrize("where", ["main thread", "another thread"])
def test_a_trainer_leaves_the_handlers_as_they_were(
    where: str, model_folder: Path, tmp_path: Path
) -> None:
    """Twice, as in a notebook."""
    video = write_clip(tmp_path / "clip.mp4", tiny_clip(3))
    before = [signal.getsignal(number) for number in SIGNALS]
    module = TokenFlowModule(
        PnP(), NNField(), "a ball", str(model_folder), "float32", cache=None, steps=1
    )

    def edit(name: str) -> None:
        trainer = Trainer(
            accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            inference_mode=False, callbacks=[RunWriter(str(tmp_path / name))],
        )  # fmt: skip
        trainer.predict(module, datamodule=Video(str(video)), return_predictions=False)

    for name in ("one", "two"):
        if where == "main thread":
            edit(name)
        else:
            with ThreadPoolExecutor(1) as threads:
                threads.submit(edit, name).result()
        assert (tmp_path / name / "clip" / "run.yaml").exists()
        assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize(
    ("asked", "ends"),
    [(None, ["met"] * 3), (0, [75] * 3)],  # rank 0 is asked before the last one comes
)
def test_ranks_that_meet_all_go_on_or_all_stop(asked: int | None, ends: list[str | int]) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = [Preemption() for _ in range(3)]

    def others_wait() -> bool:
        stopped = asked is None or store.compare_set("end/answer", "", "") == b"stop"
        return store.add("end", 0) == 2 and stopped

    def meet(rank: int) -> str | int | None:
        ranks[rank].store = TCPStore("127.0.0.1", store.port, is_master=False)
        ranks[rank].requested = rank == asked
        while rank == 1 and not others_wait():
            sleep(0.01)
        try:
            ranks[rank].meet("end", len(ranks))
        except Preempted as stopped:
            return int(str(stopped.code))
        return "met"

    with ThreadPoolExecutor(len(ranks)) as threads:
        assert list(threads.map(meet, range(len(ranks)))) == ends


def test_a_rank_that_waits_stops_when_rank_zero_has_ended() -> None:
    server, rank = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False), Preemption()
    rank.store = TCPStore("127.0.0.1", server.port, is_master=False)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(rank.meet, "end", 2)
        sleep(0.2)
        assert waiting.running()
        del server
        with pytest.raises(Preempted):
            waiting.result()
