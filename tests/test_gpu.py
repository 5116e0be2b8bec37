"""What needs an accelerator."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from torch import Tensor

from tests.diffusion.making import make_controlnet
from tests.metrics.making import noise, write_random_alexnet, write_tiny_clip
from tests.on_ranks import on_ranks
from tokenflow.cli.main import main
from tokenflow.diffusion import Backbone
from tokenflow.editors import ControlNet, Editor, PnP, Prompts, SDEdit
from tokenflow.engine import Settings, SourceCache, edit_clip
from tokenflow.engine.edit import frames_needed
from tokenflow.engine.keyframes import split_windows
from tokenflow.engine.ranks.group import FrameGroup
from tokenflow.engine.resume import ResumeStore
from tokenflow.engine.settings import KeyframeAttention
from tokenflow.errors import Preempted
from tokenflow.metrics import ClipEmbedder, load_lpips, lpips
from tokenflow.propagation import RAFT, FlowWeighted, NNField, Propagation
from tokenflow.storage.cache import Cache
from tokenflow.testing import tiny_clip
from tokenflow.video import Clip, read_clip, write_clip

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
PROMPTS = Prompts("a blue ball", "", "a ball")
SETTINGS = Settings(steps=3, keyframe_every=4, span=1, anchors=1)


@dataclass(frozen=True)
class Case:
    """An edit."""

    editor: Editor
    kernel: Propagation = NNField()  # noqa: RUF009 (it holds nothing that changes)
    settings: Settings = SETTINGS


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory, backbone: Backbone) -> dict[str, Case]:
    control = str(make_controlnet(tmp_path_factory.mktemp("control"), backbone.unet))
    return {
        "PnP": Case(PnP()),
        "PnP, full": Case(PnP(), settings=Settings(3, keyframe_every=4, keyframe_attention="full")),
        "PnP, joint": Case(PnP(), settings=Settings(3, consistency="joint")),
        "PnP, per frame": Case(PnP(), settings=Settings(3, consistency="none")),
        "SDEdit": Case(SDEdit(0.7, "independent")),
        "ControlNet": Case(ControlNet(control, control_source=True)),
        "FlowWeighted": Case(PnP(), FlowWeighted()),
    }


def frames(backbone: Backbone, case: Case, clip: Clip) -> Tensor:
    editor = copy.deepcopy(case.editor)
    return edit_clip(backbone, clip, PROMPTS, editor, case.kernel, case.settings).clip.frames[:]


@pytest.fixture(scope="module")
def backbones(model_folder: Path) -> dict[str, Backbone]:
    kinds = [("cpu", "float32"), ("cuda", "float32"), ("cuda", "float16"), ("cuda", "bfloat16")]
    return {" ".join(kind): Backbone.load(model_folder, *kind) for kind in kinds}


def test_cpu_and_gpu_agree_in_float32(
    cases: dict[str, Case], backbones: dict[str, Backbone]
) -> None:
    for name, case in cases.items():
        cpu, gpu = (
            frames(backbones[f"{kind} float32"], case, tiny_clip(9)) for kind in ("cpu", "cuda")
        )
        # a near-tie may match another token, so the mean, not the largest difference
        assert (cpu - gpu).abs().mean() < 1e-3, name


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_near(
    dtype: str, cases: dict[str, Case], backbones: dict[str, Backbone]
) -> None:
    for name, case in cases.items():
        half, single = (
            frames(backbones[f"cuda {kind}"], case, tiny_clip(9)) for kind in (dtype, "float32")
        )
        assert torch.isfinite(half).all(), name
        # of random frames by random weights; unrelated ones differ by a third
        assert (half - single).abs().mean() < 0.05, name


def test_the_same_seed_gives_the_same(
    cases: dict[str, Case], backbones: dict[str, Backbone]
) -> None:
    for name, case in cases.items():
        first, second = (frames(backbones["cuda float16"], case, tiny_clip(9)) for _ in range(2))
        assert torch.equal(first, second), name


def test_an_interrupted_run_goes_on_bit_for_bit(
    backbones: dict[str, Backbone], tmp_path: Path
) -> None:
    store = ResumeStore(Cache(tmp_path), "PnP()", "NNField()", 1)

    def edit(store: ResumeStore | None, stop: int | None = None) -> Tensor:
        return edit_clip(
            backbones["cuda float16"], tiny_clip(9), PROMPTS, PnP(), NNField(), SETTINGS,
            on_step=lambda stage, done, _: "stop" if (stage, done) == ("edit", stop) else None,
            store=store,
        ).clip.frames[:]  # fmt: skip

    whole = edit(None)
    with pytest.raises(Preempted):
        edit(store, stop=2)
    assert torch.equal(edit(store), whole)


def test_memory_on_the_device_does_not_grow(backbones: dict[str, Backbone]) -> None:
    backbone, peaks = backbones["cuda float16"], []
    for count in (24, 24, 96):  # the first makes what is made once
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        settings = Settings(steps=1, keyframe_every=1)
        frames(backbone, Case(PnP(), settings=settings), tiny_clip(count))
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[2] <= 1.1 * peaks[1]


@pytest.mark.parametrize("attention", ["full", "windowed"])
def test_nothing_waits_for_the_device_inside_a_pass(
    attention: KeyframeAttention, backbones: dict[str, Backbone]
) -> None:
    backbone, passes, armed = backbones["cuda float16"], [], False

    def arm(stage: str, done: int, _: int) -> None:
        nonlocal armed
        armed = stage == "edit"  # after its first step, in which kernels' answers are checked

    def enter(*_: object) -> None:
        if armed:
            passes.append(None)
            torch.cuda.set_sync_debug_mode("error")

    def leave(*_: object) -> None:
        torch.cuda.set_sync_debug_mode("default")

    # between passes the latents go to host memory, which has to be waited for
    hooks = (
        backbone.network.register_forward_pre_hook(enter),
        backbone.network.register_forward_hook(leave, always_call=True),
    )
    settings = Settings(3, keyframe_every=4, keyframe_attention=attention)
    try:
        for cache in (None, shared := SourceCache(), shared):
            edit_clip(
                backbone, tiny_clip(9), PROMPTS, PnP(), NNField(), settings, on_step=arm,
                source_cache=cache,
            )  # fmt: skip
            armed = False
    finally:
        leave()
        for hook in hooks:
            hook.remove()
    assert len(passes) >= 3 * 2 * 2  # of keyframes and windows, in two steps of three edits


def test_networks_that_measure_agree_with_the_cpu(tmp_path: Path) -> None:
    reason = "torchvision has LPIPS's and RAFT's networks"
    optical_flow = pytest.importorskip("torchvision.models.optical_flow", reason=reason)
    frames, others = noise(3, 3, 136, 128), noise(3, 3, 136, 128, seed=1)
    clip, weights = write_tiny_clip(tmp_path), write_random_alexnet(tmp_path)
    flow = optical_flow.raft_small(weights=None)
    torch.save(flow.state_dict(), tmp_path / "raft.pth")
    found = []
    for device in ("cpu", "cuda"):
        images, text = ClipEmbedder(str(clip), device)(frames, "a ball")
        apart = lpips(load_lpips(str(weights), device), frames, others)
        raft = RAFT(str(tmp_path / "raft.pth"), size="small", updates=2, device=device)
        raft.prepare(Clip.from_frames(frames))
        motion = raft.between(Clip.from_frames(frames), 0, 1)
        found.append((images, text, apart, motion))
    for cpu, gpu in zip(*found, strict=True):
        assert gpu.device.type == "cpu"
        # convolutions round to 10 bits on the device
        assert (cpu - gpu).abs().mean() <= 0.05 * cpu.abs().mean()


def test_command_line(model_folder: Path, tmp_path: Path) -> None:
    write_clip(tmp_path / "source.mp4", tiny_clip(9))
    words = [
        "predict", f"--data.video={tmp_path / 'source.mp4'}", "--model.prompt=a ball",
        f"--model.backbone={model_folder}", "--model.steps=2", f"--output.folder={tmp_path}",
        "--trainer.strategy=ddp", "--trainer.devices=1", "--metrics.measure=true",
    ]  # fmt: skip
    main(words)
    run = yaml.safe_load((tmp_path / "source" / "run.yaml").read_text())["run"]
    assert run["device"] == "cuda:0"
    assert len(read_clip(tmp_path / "source" / "edited.mp4")) == 9


def shared(model: Path, cases: dict[str, Case]) -> dict[str, Tensor]:
    """On each rank, latents of its own frames."""
    device = torch.device("cuda", dist.get_rank() % torch.cuda.device_count())
    torch.cuda.set_device(device)
    torch.backends.cudnn.allow_tf32 = False  # its rounding is above the tolerance
    backbone, latents = Backbone.load(model, str(device), "float32"), {}
    for name, case in cases.items():
        ranks = FrameGroup.join()
        shard = ranks.shard(split_windows(13, case.settings.keyframe_every))
        clip = tiny_clip(13).part(frames_needed(shard, case.settings, case.editor))
        editor = copy.deepcopy(case.editor)
        latents[name] = edit_clip(
            backbone, clip, PROMPTS, editor, case.kernel, case.settings, ranks=ranks
        ).latents
    return latents


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_ranks_agree(
    backend: str, cases: dict[str, Case], model_folder: Path, tmp_path: Path
) -> None:
    if backend == "nccl" and torch.cuda.device_count() < 2:
        pytest.skip("there is one CUDA device, and NCCL wants one for each rank")
    if backend == "gloo":  # it sends host memory only, which is all that windowed attention needs
        cases = {
            name: case
            for name, case in cases.items()
            if case.settings.keyframe_attention == "windowed"
            and case.settings.consistency == "tokenflow"
        }
    alone, both = (
        on_ranks(size, tmp_path / f"{size}", shared, model_folder, cases, backend=backend)
        for size in (1, 2)
    )
    for name in cases:
        together = torch.cat([part[name] for part in both])
        assert (together - alone[0][name]).abs().max() <= 1e-4, name
