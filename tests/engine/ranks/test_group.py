"""Results do not depend on how many ranks share a clip; the bytes exchanged are counted."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.diffusion.making import make_controlnet
from tests.on_ranks import on_ranks
from tokenflow.diffusion import Backbone
from tokenflow.editors import DDCM, ControlNet, ControlVideo, Editor, FlowEdit, PnP, SDEdit
from tokenflow.engine import Settings, edit_clip
from tokenflow.engine.edit import frames_needed
from tokenflow.engine.keyframes import split_windows
from tokenflow.engine.ranks.group import FrameGroup
from tokenflow.errors import InputError, Preempted
from tokenflow.propagation import FlowFiles, FlowWeighted, NNField, Propagation
from tokenflow.testing import tiny_clip
from tokenflow.video import Clip, write_clip

EVERY, STEPS = 4, 2
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
    given_control = ControlNet(control, ControlVideo(str(given)), noise="independent")
    return {
        "float32": Case(13, PnP(), double=False),
        "float32, windowed, sdedit, flow": Case(18, SDEdit(0.7), FlowWeighted(), BOUNDED, False),
        "uneven, ragged": Case(13, PnP()),
        "fewer windows than ranks, sdedit, flow": Case(6, SDEdit(0.7), FlowWeighted()),
        "fewer, controlnet": Case(6, ControlNet(control, control_source=True)),
        "one frame": Case(1, PnP()),
        "renoised, previous": Case(
            13, PnP(start_from="renoised"), settings=(("neighbours", "previous"),)
        ),
        "flow files": Case(13, PnP(), FlowWeighted(FlowFiles(str(flow)))),
        "joint": Case(13, PnP(), settings=(("consistency", "joint"),)),
        "none, sdedit, independent": Case(
            6, SDEdit(0.7, "independent"), settings=(("consistency", "none"),)
        ),
        "control video": Case(13, given_control),
        "windowed": Case(18, PnP(), settings=BOUNDED),
        "windowed, flow, previous": Case(
            18, SDEdit(0.7), FlowWeighted(), (*BOUNDED, ("neighbours", "previous"))
        ),
        "flowedit": Case(13, FlowEdit(n_max=2, noise="independent")),
        "windowed, ddcm": Case(18, DDCM(noise="independent"), settings=BOUNDED),
        "fused": Case(13, PnP(), settings=(("fusion", 0.8),)),
        "fewer, fused": Case(6, PnP(), settings=(("fusion", 0.8),)),
        "windowed, fused, previous": Case(
            18, PnP(), settings=(*BOUNDED, ("neighbours", "previous"), ("fusion", 0.5))
        ),
        "windowed, fewer, controlnet": Case(6, ControlNet(control), settings=BOUNDED),
        "windowed, one frame, sdedit, shared, flow": Case(
            1, SDEdit(0.7, "shared"), FlowWeighted(), BOUNDED
        ),
    }


def edited(cases: dict[str, Case], model: Path) -> dict[str, Part]:
    """On each rank, with only the frames that it needs."""
    parts, single, double = {}, *(Backbone.load(model, "cpu", "float32") for _ in range(2))
    for network in (double.unet, double.vae, double.text_encoder):
        network.double()
    for name, case in cases.items():
        ranks = FrameGroup.join()
        shard = ranks.shard(split_windows(case.frames, EVERY))
        chosen = {"keyframe_attention": "full", "fusion": 0.0, **dict(case.settings)}
        settings = Settings(steps=STEPS, keyframe_every=EVERY, batch=5, **chosen)
        clip = tiny_clip(case.frames).part(frames_needed(shard, settings, case.editor))
        result = edit_clip(
            double if case.double else single,
            clip,
            "a ball",
            copy.deepcopy(case.editor),
            case.kernel,
            settings,
            ranks=ranks,
        )
        frames = result.clip.frames
        collected: list[Tensor] = []
        ranks.gather(frames, shard.frame_counts, collected.append)
        whole = torch.stack(collected) if collected else None
        parts[name] = Part(
            result.clip.first, result.latents, frames, ranks.received, shard.idle, whole
        )
    return parts


@pytest.fixture(scope="module")
def alone(
    cases: dict[str, Case], model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Part]:
    # in a process as the ranks are: another number of threads sums in another order, too
    return on_ranks(1, tmp_path_factory.mktemp("alone"), edited, cases, model_folder)[0]


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.full)])
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
        "all_gather": lambda self, own, counts, host=False: own,
        "exchange_halo": lambda self, own, counts, host=False: torch.cat([own[:1], own, own[-1:]])[
            self.rank == 0 : len(own) + 2 - (self.rank == self.size - 1)
        ],
    }
    setattr(FrameGroup, exchange, repeated[exchange])
    return edited(cases, model)


@pytest.mark.parametrize("exchange", ["all_gather", "exchange_halo"])
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


def collectives() -> dict[str, Any]:
    """What a rank of three has from what is not in an edit, and the errors that it raises."""
    ranks, found, said = FrameGroup.join(), {}, list[str]()

    def fails_on(rank: int) -> None:
        if ranks.rank == rank:
            raise InputError("the disk is full")

    def full(item: Tensor) -> None:
        raise InputError("the disk is full")

    with pytest.raises(InputError) as last, ranks.together():
        fails_on(2)
    with pytest.raises(InputError) as first:
        ranks.gather(torch.zeros(1, 2), (1, 1, 1), full)
    said += str(last.value), str(first.value)
    found["knows"] = ranks.knows(first.value), ranks.knows(last.value)
    with ranks.together():
        ranks.preemption.requested = ranks.rank == 1
    try:
        with ranks.together(), ranks.preemption.interruptible():
            pass
    except Preempted as stopped:
        found["stopped"] = stopped.code
    found["any"] = ranks.any(ranks.rank == 1, False)
    found["mean"] = ranks.mean(float(ranks.rank), ranks.rank)  # (0·0 + 1·1 + 2·2) / (0 + 1 + 2)
    return found | {"said": said}


def test_an_error_or_a_request_to_stop_is_all_ranks(tmp_path: Path) -> None:
    own, other = (
        "the disk is full",
        "rank {} failed, and all stop with it: InputError: the disk is full",
    )
    for rank, found in enumerate(on_ranks(3, tmp_path, collectives)):
        assert found == {
            "said": [own if rank == 2 else other.format(2), own if rank == 0 else other.format(0)],
            "knows": (True, False),  # the last error only
            "stopped": 75,
            "any": [True, False],
            "mean": pytest.approx(5 / 3),
        }


def test_what_arrives_is_what_the_documentation_predicts(
    cases: dict[str, Case], backbone: Backbone, shared: list[dict[str, Part]]
) -> None:
    sites = tokens_times_channels(backbone)
    # where PnP takes the source's queries and keys, in the first of two steps, keys are shared
    keys_shared = sum(sites[layer.removesuffix(".to_q")] for layer in backbone.layers("queries"))
    numbers, ranks = sum(sites.values()), len(shared)
    for name in ("uneven, ragged", "windowed"):
        windows = len(split_windows(cases[name].frames, EVERY))
        most = -(-windows // ranks)
        latent = 4 * 8 * 16  # of 16x32 pixels
        for rank, part in enumerate(part[name] for part in shared):
            if part.idle:
                continue
            beside = (rank > 0) + (rank < min(ranks, windows) - 1)
            gathered = (ranks - 1) * most * (STEPS * 2 * 2 * numbers - keys_shared)
            halo = STEPS * beside * 4 * numbers
            if name == "windowed":
                gathered, halo = STEPS * (ranks - 1) * most * 3 * latent, 0
            size = 4 if name == "windowed" else 8  # latents are in float32, features in double
            assert part.received == size * (gathered + halo), name


def tokens_times_channels(backbone: Backbone) -> dict[str, int]:
    """Of each site, found by running the UNet."""
    seen: dict[str, int] = {}
    hooks = [
        backbone.network.get_submodule(site).register_forward_hook(
            lambda module, inputs, output, site=site: seen.update({site: output[0].numel()})
        )
        for site in backbone.sites()
    ]
    latents = backbone.encode(tiny_clip(1).frames)
    backbone.predict(latents, 1.0, backbone.embed([""]))
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("size", range(1, 6))
@pytest.mark.parametrize("windows", range(1, 12))
def test_every_window_has_one_rank(size: int, windows: int) -> None:
    split = split_windows(3 * windows - 1, 3)
    shards = [FrameGroup(rank, size).shard(split) for rank in range(size)]
    owned = [number for shard in shards if not shard.idle for number in shard.own]
    assert owned == list(range(windows))
    for rank, shard in enumerate(shards):
        assert sum(shard.counts) == windows
        assert max(shard.counts) - min(shard.counts) <= 1
        assert sum(shard.frame_counts) == 3 * windows - 1
        assert shard.idle == (shard.counts[rank] == 0)
        if not shard.idle:
            assert set(shard.own) <= set(shard.halo) <= set(range(windows))
            assert len(shard.frames) == shard.frame_counts[rank]
