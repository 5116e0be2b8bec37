"""Results do not depend on how many ranks share a clip; what they tell each other is counted."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from diffusers import UNet2DConditionModel
from torch import Tensor

from tests.diffusion.making import make_controlnet
from tests.on_ranks import on_ranks
from tokenflow.diffusion import Backbone
from tokenflow.editors import ControlNet, ControlVideo, Edit, Editor, PnP, SDEdit
from tokenflow.engine import Settings, edit_clip
from tokenflow.engine.attention import self_attention_sites
from tokenflow.engine.editing import needed
from tokenflow.engine.keyframes import split_windows
from tokenflow.engine.ranks.group import FrameGroup
from tokenflow.errors import InputError
from tokenflow.propagation import FlowFiles, FlowWeighted, NNField, Propagation
from tokenflow.testing import tiny_clip
from tokenflow.video import Clip, write_clip

EVERY, STEPS = 4, 3
# float32 sums over keyframes in another order, through three steps and a decoder
TOLERANCE = 1e-4
# where that decides which of two tokens is the nearer one, a frame takes another's features: most
# cases are in double precision, and few values of the others may be so much apart
RARE, APART = 0.1, 0.05
BOUNDED = (("keyframe_attention", "windowed"), ("span", 2), ("anchors", 1))


@dataclass(frozen=True)
class Case:
    """An edit of a clip of so many frames."""

    frames: int
    editor: Editor
    kernel: Propagation = NNField()  # noqa: RUF009 (it holds nothing that changes)
    settings: tuple[tuple[str, Any], ...] = ()
    double: bool = True


@dataclass(frozen=True)
class Part:
    """What one rank returns: where its frames begin, these, bytes received, all frames."""

    first: int
    latents: Tensor
    frames: Tensor
    received: int
    idle: bool
    whole: Tensor | None


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory, backbone: Backbone) -> dict[str, Case]:
    control = str(make_controlnet(tmp_path_factory.mktemp("control"), backbone.unet))
    given, flow = tmp_path_factory.mktemp("given") / "control.mp4", tmp_path_factory.mktemp("flow")
    write_clip(given, Clip.from_frames(tiny_clip(13).frames.flip(0)))
    for start, end in itertools.permutations(range(13), 2):
        if abs(end - start) == 1:
            constant = np.float32([end - start, 0.5 * (start - end)])
            np.save(flow / f"{start}_{end}.npy", np.broadcast_to(constant, (16, 32, 2)))
    return {
        "float32": Case(13, PnP(), double=False),
        "float32, windowed, sdedit, flow": Case(18, SDEdit(0.7), FlowWeighted(), BOUNDED, False),
        "float32, controlnet": Case(13, ControlNet(control), double=False),
        "even": Case(16, PnP()),
        "uneven, ragged": Case(13, PnP()),
        "fewer windows than ranks": Case(6, PnP()),
        "one frame": Case(1, PnP()),
        "renoised, previous": Case(
            13, PnP(start_from="renoised"), settings=(("neighbours", "previous"),)
        ),
        "flow": Case(13, PnP(), FlowWeighted()),
        "joint": Case(13, PnP(), settings=(("consistency", "joint"),)),
        "none": Case(6, PnP(), settings=(("consistency", "none"),)),
        "sdedit": Case(13, SDEdit(0.7)),
        "sdedit, shared": Case(13, SDEdit(0.7, "shared")),
        "sdedit, independent": Case(6, SDEdit(0.7, "independent")),
        "controlnet": Case(13, ControlNet(control, noise="independent", control_source=True)),
        "control video": Case(13, ControlNet(control, ControlVideo(str(given)))),
        "flow files": Case(13, PnP(), FlowWeighted(FlowFiles(str(flow)))),
        "windowed": Case(18, PnP(), settings=BOUNDED),
        "windowed, flow, previous": Case(
            18, SDEdit(0.7), FlowWeighted(), (*BOUNDED, ("neighbours", "previous"))
        ),
        "windowed, controlnet": Case(13, ControlNet(control), settings=BOUNDED),
        "windowed, fewer windows than ranks": Case(6, PnP(), settings=BOUNDED),
        "windowed, one frame": Case(1, PnP(), settings=BOUNDED),
        "fewer, sdedit, flow": Case(6, SDEdit(0.7), FlowWeighted()),
        "windowed, fewer, sdedit, shared, flow": Case(
            6, SDEdit(0.7, "shared"), FlowWeighted(), BOUNDED
        ),
        "one frame, sdedit, flow": Case(1, SDEdit(0.7), FlowWeighted()),
        "fewer, controlnet": Case(6, ControlNet(control, control_source=True)),
        "windowed, fewer, controlnet": Case(6, ControlNet(control), settings=BOUNDED),
        "windowed, one frame, controlnet": Case(1, ControlNet(control), settings=BOUNDED),
    }


def edited(cases: dict[str, Case], model: Path) -> dict[str, Part]:
    """On each rank, with only the frames that it needs."""
    parts, single, double = {}, *(Backbone.load(model, device="cpu") for _ in range(2))
    for network in (double.unet, double.vae, double.text_encoder):
        network.double()
    for name, case in cases.items():
        group = FrameGroup.join()
        share = group.share(split_windows(case.frames, EVERY))
        chosen = {"keyframe_attention": "full", **dict(case.settings)}
        settings = Settings(steps=STEPS, keyframe_every=EVERY, batch=3, **chosen)
        clip = tiny_clip(case.frames).part(needed(share, settings, case.editor))
        result = edit_clip(
            double if case.double else single,
            clip,
            "a ball",
            copy.deepcopy(case.editor),
            case.kernel,
            settings=settings,
            group=group,
        )
        frames = result.clip.frames
        collected: list[Tensor] = []
        group.to_first(frames, share.frame_counts, collected.append)
        whole = torch.stack(collected) if collected else None
        parts[name] = Part(
            result.clip.first, result.latents, frames, group.received, share.idle, whole
        )
    return parts


@pytest.fixture(scope="module")
def alone(
    cases: dict[str, Case], model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Part]:
    # in a process as the ranks are: another number of threads sums in another order, too
    return on_ranks(1, tmp_path_factory.mktemp("alone"), edited, cases, model_folder)[0]


@pytest.fixture(scope="module", params=[2, 3, 4])
def shared(
    request: pytest.FixtureRequest,
    cases: dict[str, Case],
    model_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> list[dict[str, Part]]:
    folder = tmp_path_factory.mktemp("ranks")
    return on_ranks(request.param, folder, edited, cases, model_folder)


def test_several_ranks_agree_with_one(
    cases: dict[str, Case], alone: dict[str, Part], shared: list[dict[str, Part]]
) -> None:
    for name, case in cases.items():
        working = [rank[name] for rank in shared if not rank[name].idle]
        windows = len(split_windows(case.frames, EVERY))
        assert len(working) == min(len(shared), windows), name
        assert [part.first for part in working] == sorted({part.first for part in working})
        for what in ("latents", "frames"):
            together = torch.cat([getattr(part, what) for part in working])
            expected = getattr(alone[name], what)
            assert together.shape == expected.shape, name
            difference = (together - expected).abs()
            largest, other = difference.max(), (difference > TOLERANCE).double().mean()
            allowed = (TOLERANCE, 0.0) if case.double else (APART, RARE)
            assert largest <= allowed[0], f"{name}, {what}: {largest}"
            assert other <= allowed[1], f"{name}, {what}: {other}"


def test_the_first_rank_is_sent_all_frames(
    cases: dict[str, Case], shared: list[dict[str, Part]]
) -> None:
    for name in cases:
        first, *others = [rank[name] for rank in shared]
        assert first.whole is not None
        assert all(part.whole is None for part in others)
        working = [part.frames for part in (first, *others) if not part.idle]
        assert torch.equal(first.whole, torch.cat(working)), name


def without(exchange: str, cases: dict[str, Case], model: Path) -> dict[str, Part]:
    """As `edited`, but this exchange between ranks is left out."""
    repeated = {
        "gather": lambda self, own, counts: own,
        "with_neighbours": lambda self, own, counts: torch.cat([own[:1], own, own[-1:]])[
            self.rank == 0 : len(own) + 2 - (self.rank == self.size - 1)
        ],
    }
    setattr(FrameGroup, exchange, repeated[exchange])
    return edited(cases, model)


@pytest.mark.parametrize("exchange", ["gather", "with_neighbours"])
def test_without_an_exchange_the_result_is_another(
    exchange: str,
    cases: dict[str, Case],
    alone: dict[str, Part],
    model_folder: Path,
    tmp_path: Path,
) -> None:
    name = "uneven, ragged"
    parts = on_ranks(2, tmp_path, without, exchange, {name: cases[name]}, model_folder)
    together = torch.cat([part[name].frames for part in parts])
    assert float((together - alone[name].frames).abs().max()) > 10 * TOLERANCE


def failing_on_the_last() -> str:
    group = FrameGroup.join()
    try:
        with group.together():
            if group.rank == group.size - 1:
                raise InputError("its disk is full")
    except InputError as error:
        return str(error)
    return "nothing"


class FailsOnTheLast(PnP):
    """Raises in a pass of the last rank, between two sites, while others are in their own."""

    def edits(self, unet: UNet2DConditionModel) -> list[Edit]:
        def fails(edited: Tensor, source: Tensor) -> Tensor:
            raise InputError("it is not its day")

        *others, last = super().edits(unet)
        mine = dist.get_rank() == dist.get_world_size() - 1
        return [*others, replace(last, function=fails) if mine else last]


def failing_in_a_pass(model: Path, chosen: dict[str, Any]) -> str:
    """What it failed with; afterwards the ranks go on with something else."""
    group, settings = FrameGroup.join(), Settings(keyframe_every=2, **chosen)
    with pytest.raises(InputError) as caught:
        edit_clip(
            Backbone.load(model, device="cpu"), tiny_clip(8), "a ball", FailsOnTheLast(), NNField(),
            settings=settings, group=group,
        )  # fmt: skip
    assert group.knows(caught.value)
    assert group.gather(torch.tensor([group.rank]), [1] * group.size).tolist() == [0, 1, 2]
    return str(caught.value)


def failing_alone() -> str:
    def work(heed: Callable[[], None]) -> None:
        heed()
        raise InputError("its disk is full")

    with pytest.raises(InputError) as caught:
        FrameGroup.join().first_alone(work)
    return str(caught.value)


def averaged() -> float:
    group = FrameGroup.join()
    return group.mean(float(group.rank), group.rank)  # (0·0 + 1·1 + 2·2) / (0 + 1 + 2)


def test_an_error_of_one_rank_is_all_ranks(tmp_path: Path) -> None:
    first, last = on_ranks(2, tmp_path, failing_on_the_last)
    assert first == "rank 1 failed, and all stop with it: InputError: its disk is full"
    assert last == "its disk is full"


@pytest.mark.parametrize(
    "chosen",
    [dict(BOUNDED), {"keyframe_attention": "full"}, {"consistency": "joint"}],
    ids=["windowed", "full", "joint"],
)
def test_an_error_in_a_pass_is_all_ranks(
    chosen: dict[str, Any], model_folder: Path, tmp_path: Path
) -> None:
    *others, last = on_ranks(3, tmp_path, failing_in_a_pass, model_folder, chosen)
    told = "rank 2 failed, and all stop with it: InputError: it is not its day"
    assert (others, last) == ([told, told], "it is not its day")


def test_an_error_of_who_works_alone_is_all_ranks(tmp_path: Path) -> None:
    first, last = on_ranks(2, tmp_path, failing_alone)
    assert first == "its disk is full"
    assert last == "rank 0 failed, and all stop with it: InputError: its disk is full"


@pytest.mark.parametrize("ends", [None, KeyboardInterrupt(), InputError("its disk is full")])
def test_who_works_alone_says_when_it_is_done(ends: BaseException | None) -> None:
    group, said = FrameGroup(), []

    def work(heed: Callable[[], None]) -> None:
        heed()
        if ends is not None:
            raise ends

    group.tell = lambda own: [said.append(own) or own]  # type: ignore[method-assign, assignment]
    with pytest.raises(type(ends)) if ends is not None else nullcontext():
        group.first_alone(work)
    interrupted = isinstance(ends, KeyboardInterrupt)  # the others would be waited for
    assert said[:1] == ([] if interrupted else [None])


def test_who_works_alone_does_not_go_on_without_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    group, done = FrameGroup(), []

    def lost(own: Any) -> list[Any]:
        raise RuntimeError("Connection closed by peer")

    def work(heed: Callable[[], None]) -> None:
        with suppress(Exception):  # as where a metric that breaks costs no run
            heed()
        done.append("the record that says that all is there")

    monkeypatch.setattr(group_module, "PULSE", 0.0)
    group.tell = lost  # type: ignore[method-assign, assignment]
    with pytest.raises(RuntimeError, match="closed by peer"):
        group.first_alone(work)
    assert not done


def test_means_count_by_weight(tmp_path: Path) -> None:
    assert on_ranks(3, tmp_path, averaged) == [pytest.approx(5 / 3)] * 3


def test_what_arrives_is_what_the_documentation_predicts(
    cases: dict[str, Case], backbone: Backbone, shared: list[dict[str, Part]]
) -> None:
    numbers = tokens_times_channels(backbone)
    ranks = len(shared)
    for name in ("even", "uneven, ragged", "windowed"):
        windows = len(split_windows(cases[name].frames, EVERY))
        most = -(-windows // ranks)
        latent = 4 * 8 * 16  # of 16x32 pixels
        for rank, part in enumerate(part[name] for part in shared):
            if part.idle:
                continue
            beside = (rank > 0) + (rank < min(ranks, windows) - 1)
            gathered = (ranks - 1) * most * 2 * 2 * numbers
            halo = beside * 4 * numbers
            if name == "windowed":
                gathered, halo = (ranks - 1) * most * 2 * latent, 0
            size = 4 if name == "windowed" else 8  # latents are in float32, features in double
            assert part.received == STEPS * size * (gathered + halo), name


def tokens_times_channels(backbone: Backbone) -> int:
    """Σ over sites, found by running the UNet."""
    seen: list[int] = []
    hooks = [
        backbone.unet.get_submodule(site.removesuffix(".processor")).register_forward_hook(
            lambda module, inputs, output: seen.append(output[0].numel())
        )
        for site in self_attention_sites(backbone.unet)
    ]
    latents = backbone.encode(tiny_clip(1).frames)
    backbone.epsilon(latents, 1, backbone.embed([""]), backbone.schedule(2))
    for hook in hooks:
        hook.remove()
    return sum(seen)


@pytest.mark.parametrize("size", range(1, 6))
@pytest.mark.parametrize("windows", range(1, 12))
def test_every_window_has_one_rank(size: int, windows: int) -> None:
    split = split_windows(3 * windows - 1, 3)
    shares = [FrameGroup(rank, size).share(split) for rank in range(size)]
    owned = [number for share in shares if not share.idle for number in share.own]
    assert owned == list(range(windows))
    for share in shares:
        assert sum(share.counts) == windows
        assert max(share.counts) - min(share.counts) <= 1
        assert sum(share.frame_counts) == 3 * windows - 1
        assert share.idle == (share.counts[shares.index(share)] == 0)
        if not share.idle:
            assert set(share.own) <= set(share.held) <= set(range(windows))
            assert len(share.positions(share.own)) == share.frame_counts[shares.index(share)]
