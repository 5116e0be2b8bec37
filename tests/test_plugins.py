"""Plugins as they are found, listed, checked, chosen and blamed."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import EntryPoint, version
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from tests.installing import install
from tokenflow import plugins
from tokenflow.cli.main import main
from tokenflow.diffusion import Backbone, Schedule, Trajectory
from tokenflow.editors import Edit, Editor, Pass, PnP, Start
from tokenflow.engine import Settings, edit_clip
from tokenflow.errors import InputError, Interrupted, PluginError, Preempted
from tokenflow.plugins import describe, installed_plugins, load
from tokenflow.propagation import (
    Correspondence,
    FlowWeighted,
    NNField,
    OpticalFlow,
    Propagation,
    Window,
)
from tokenflow.video import Clip


class Old(PnP):
    interface = 0


class Silent(PnP):
    pass


def test_the_built_in_ones_come_through_entry_points() -> None:
    kinds = {plugin.name: plugin.kind for plugin in installed_plugins()}
    assert kinds["PnP"] is PnP
    assert kinds["NNField"] is NNField


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("Gone", "no.such.module:Gone", "ModuleNotFoundError"),
        ("Path", "pathlib:Path", "no subclass of Editor"),
        ("Other", "tokenflow.editors:PnP", "named 'Other' but its class 'PnP'"),
        ("Old", "tests.test_plugins:Old", "interface 0"),
        ("Silent", "tests.test_plugins:Silent", "add interface = 1 to the class"),
    ],
)
def test_an_unusable_plugin_is_listed_with_its_reason(name: str, value: str, reason: str) -> None:
    plugin = load(EntryPoint(name, value, "tokenflow.editors"))
    assert plugin.kind is None
    assert reason in plugin.reason
    assert f"unusable: {name} of unknown distribution: " in describe([plugin])


def test_a_name_offered_twice_is_used_by_neither(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("PnP", "tokenflow.editors:PnP", "tokenflow.editors")
    monkeypatch.setattr(
        plugins, "entry_points", lambda group: [entry, entry] if "editors" in group else []
    )
    for plugin in installed_plugins.__wrapped__():  # of no known distribution, neither is ours
        assert not plugin.usable
        assert "uninstall one" in plugin.reason


BROKEN = """
[tokenflow.editors]
Crashing = broken:Crashing
Outdated = broken:Outdated
Gone = nosuchmodule:Gone
Foreign = broken:Foreign
Leaving = leaving:Leaving
Silent = broken:Silent
Abstract = broken:Abstract
Failing = broken:Failing
OwnModel = broken:OwnModel
Ending = broken:Ending
Wrong = broken:Missing
[tokenflow.propagation]
Wrong = broken:Wrong
Asking = broken:Asking
Outdated = broken:Asking
"""
MODULE = """
from tokenflow.editors import Editor, PnP
from tokenflow.propagation import Correspondence, NNField

class Outdated(PnP):
    interface = 0

class Wrong(NNField):
    interface = 1
    def correspond(self, source, keys, window):
        found = super().correspond(source, keys, window)
        return Correspondence(found.indices, found.weights * 2)

class Asking(NNField):
    interface = 1
    def __init__(self, radius: float) -> None:
        super().__init__()
        self.radius = radius

class Silent(PnP):
    pass

class Foreign:
    pass

class SDEdit(PnP):
    "A helper, with the name of another's plugin."

class Abstract(Editor):
    interface = 1

class Failing(PnP):
    interface = 1
    def __init__(self, a: int = 1) -> None:
        raise KeyError("boom")

class OwnModel(PnP):
    interface = 1
    def __init__(self, backbone: str = "x") -> None:
        super().__init__()

class Ending(PnP):
    interface = 1
    def __init__(self) -> None:
        raise SystemExit(0)

class Crashing(PnP):
    interface = 1
    def conditioning(self, forward):
        return {"timestep_cond": forward.nonsense}
"""


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package whose plugins are all wrong, for the length of a test."""
    install(tmp_path, "tokenflow-broken", BROKEN, "0.3")
    (tmp_path / "broken.py").write_text(MODULE)
    (tmp_path / "leaving.py").write_text("raise SystemExit('no licence')")
    monkeypatch.syspath_prepend(tmp_path)
    installed_plugins.cache_clear()
    yield
    installed_plugins.cache_clear()
    sys.modules.pop("broken", None)


def run(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[Any, str]:
    """A command's exit code, and all that it prints."""
    with pytest.raises(SystemExit) as exit:
        main(words)
    return exit.value.code, "".join(capsys.readouterr())


def test_the_list_names_every_plugin_and_its_state(
    broken: None, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out = run(["plugins", "check"], capsys)
    assert code == 1
    rows = {tuple(line.split()[:4]): line for line in out.splitlines()}
    assert rows["NNField", "kernel", "tokenflow", "0.1.0"].endswith(" usable")
    assert rows["Wrong", "kernel", "tokenflow-broken", "0.3"].endswith(" usable")
    outdated = rows["Outdated", "editor", "tokenflow-broken", "0.3"]
    assert "unusable: it was written for interface 0 of Editor, this is interface 1" in outdated
    assert "import of leaving:Leaving failed: SystemExit: no licence" in out


@pytest.mark.parametrize("name", ["tokenflow evil", "tokenflow-evil", "tokenflow_evil", "zz"])
def test_only_our_distribution_keeps_our_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Whatever another one is called, and even if it offers our own class."""
    install(tmp_path, name, "[tokenflow.editors]\nPnP = tokenflow.editors:PnP\n", "6.6")
    monkeypatch.syspath_prepend(tmp_path)
    installed_plugins.cache_clear()
    try:
        both = [p for p in installed_plugins() if p.name == "PnP"]
        assert {p.distribution: p.usable for p in both} == {
            f"{name} 6.6": False,
            f"tokenflow {version('tokenflow')}": True,
        }
        assert plugins.origin(PnP) == f"tokenflow {version('tokenflow')}"
    finally:
        installed_plugins.cache_clear()


def test_a_distributions_name_has_several_spellings() -> None:
    assert plugins.canonical("TokenFlow") == "tokenflow"
    assert {plugins.canonical(n) for n in ("Token.Flow", "token__flow")} == {"token-flow"}


def test_an_interrupted_import_is_no_fault_of_the_plugin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "slow.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    install(tmp_path, "tokenflow-slow", "[tokenflow.editors]\nSlow = slow:Slow\n")
    monkeypatch.syspath_prepend(tmp_path)
    installed_plugins.cache_clear()
    code, out = run(["plugins", "check"], capsys)
    assert (code, out) == (130, "tokenflow: interrupted\n")


def test_doctor_finds_an_unusable_plugin(broken: None, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = run(["doctor", "--imports"], capsys)
    assert code == 1
    assert "Gone of tokenflow-broken 0.3: import of nosuchmodule:Gone failed" in out
    assert "something is broken" in out


@pytest.mark.parametrize(
    ("words", "code", "messages"),
    [
        (["NNField"], 0, ["ok      rows_sum_to_one", "NNField of tokenflow 0.1.0: all is well"]),
        (["NNField", "--block=3"], 0, ["all is well"]),
        (["NNField", "--block=0"], 2, ["block must be at least 1 token, got 0"]),
        (
            ["Wrong"],
            1,
            [
                "ok      index_range",
                "FAILED  rows_sum_to_one: expected rows of weights that sum to 1, got sums from 2",
                "Wrong of tokenflow-broken 0.3: ",
            ],
        ),
        (["Wrong"], 1, ["Wrong of tokenflow-broken 0.3 is unusable: import of broken:Missing"]),
        (["Outdated"], 1, ["Outdated of tokenflow-broken 0.3 is unusable: it was written for"]),
        (["Abstract"], 1, ["FAILED  it cannot be made with these options: TypeError: Can't inst"]),
        (["Failing"], 1, ["KeyError: 'boom'", "Failing of tokenflow-broken 0.3: 1 failed"]),
        (
            ["ControlNet"],
            2,
            [
                "tokenflow: error: ControlNet of tokenflow 0.1.0 does not fit the model that",
                "made for another model: expected cross-attention width 16 (found ",
                "name one that it fits with --backbone, a folder, a hub id or 'miniature'",
            ],
        ),
        (["ControlNet", "--backbone=miniature"], 0, ["ControlNet of tokenflow 0.1.0: all is well"]),
        (["OwnModel", "--backbone=y"], 0, ["OwnModel of tokenflow-broken 0.3: all is well"]),
        (["Asking"], 2, ["radius"]),
        (["Asking", "--radius=1"], 0, ["all is well"]),
        (["Nonsense"], 2, ["there is no plugin 'Nonsense'; installed are: ", "NNField"]),
    ],
)
def test_check(
    words: list[str],
    code: int,
    messages: list[str],
    broken: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found, out = run(["plugins", "check", *words], capsys)
    assert found == code, out
    for message in messages:
        assert message in out


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("editor=Outdated", "Outdated of tokenflow-broken 0.3 cannot be used: it was written for"),
        ("editor=broken.Outdated", "cannot be used: it was written for interface 0"),
        ("editor=Gone", "Gone of tokenflow-broken 0.3: import of nosuchmodule:Gone failed"),
        ("editor=Foreign", "Foreign of tokenflow-broken 0.3: broken:Foreign is no subclass of E"),
        ("propagation=Nonsense", "installed are: "),
    ],
)
def test_choosing_an_unusable_plugin_gives_its_reason(
    option: str, reason: str, broken: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, name = option.split("=")
    config = tmp_path / "config.yaml"
    config.write_text(f"model:\n  {kind}: {name}\n")
    for choice in (f"--model.{option}", f"--config={config}"):
        code, out = run(["predict", "--data.video=in.mp4", "--model.prompt=a ball", choice], capsys)
        assert code == 2
        assert reason in out


@pytest.mark.parametrize(
    "options",
    [
        ["--model.editor=tokenflow.SDEdit", "--model.editor.strength=0.5"],
        ["--model.propagation=broken.Wrong"],
    ],
)
def test_a_class_path_tells_two_classes_of_one_name_apart(
    options: list[str], broken: None, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["predict", "--data.video=gone.mp4", "--model.prompt=a ball"]
    code, out = run([*words, *options], capsys)
    assert code == 2
    assert "gone.mp4 does not exist" in out  # as far as a run gets


def test_a_name_of_two_classes_asks_for_the_class_path(
    broken: None, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["predict", "--data.video=gone.mp4", "--model.prompt=a ball", "--model.editor=SDEdit"]
    code, out = run(words, capsys)
    assert code == 2
    assert "Give the full class path" in out


@pytest.fixture
def clashing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Three packages, of which one takes a name of tokenflow's and two one of each other's."""
    offered = {"second": "PnP", "third": "Own", "fourth": "Own"}
    for package, name in offered.items():
        group = f"[tokenflow.editors]\n{name} = {package}:{name}\n"
        install(tmp_path, f"tokenflow-{package}", group)
        text = f"from tokenflow.editors import PnP as P\n\nclass {name}(P):\n    interface = 1\n"
        (tmp_path / f"{package}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    installed_plugins.cache_clear()
    yield
    installed_plugins.cache_clear()
    for package in offered:
        sys.modules.pop(package, None)


def test_a_name_that_clashes_stops_only_those_who_choose_the_newcomer_by_it(
    clashing: None, capsys: pytest.CaptureFixture[str]
) -> None:
    def errors(editor: str) -> str:
        words = ["predict", "--data.video=gone.mp4", "--model.prompt=a ball"]
        return run([*words, f"--model.editor={editor}"], capsys)[1]

    clash = "the name is offered by {} and {}; uninstall one, or choose by class path"
    _, listed = run(["plugins", "check"], capsys)
    rows = [line.split(maxsplit=4) for line in listed.splitlines()[1:]]
    states = {(row[0], row[2]): row[4].strip() for row in rows}
    assert states["PnP", "tokenflow"] == "usable"
    reason = clash.format("tokenflow 0.1.0", "tokenflow-second 1.0")
    assert states["PnP", "tokenflow-second"] == f"unusable: {reason}"
    assert clash.format("tokenflow-fourth 1.0", "tokenflow-third 1.0") in errors("Own")
    # the run goes on to its missing video
    for editor in ("tokenflow.PnP", "second.PnP"):
        assert "gone.mp4 does not exist" in errors(editor)
    assert "Give the full class path" in errors("PnP")


def test_a_plugins_options_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    code, out = run(["predict", "--model.editor.help", "PnP"], capsys)
    assert code == 0
    assert "attention ATTENTION" in out
    assert "Share of the steps in which decoder self-attentions" in out


class Raising(PnP):
    """Raises in one of its methods, in the middle of a pass."""

    def __init__(self, where: str, error: BaseException) -> None:
        super().__init__()
        self.where, self.error = where, error

    def at(self, where: str) -> None:
        if where == self.where:
            raise self.error

    def prepare(self, backbone: Backbone, clip: Clip) -> None:
        self.at("prepare")

    def start(self, trajectory: Trajectory, schedule: Schedule, seed: int) -> Start:
        self.at("start")
        return super().start(trajectory, schedule, seed)

    def edits(self, unet: UNet2DConditionModel) -> Sequence[Edit]:
        self.at("edits")
        return [*super().edits(unet), Edit(unet.up_blocks[2].resnets[1].conv2, self.mix)]

    def mix(self, edited: Tensor, source: Tensor) -> Tensor:
        self.at("mix")
        return edited

    def conditioning(self, forward: Pass) -> dict[str, Any]:
        if len(forward.branches) > 1:
            self.at("conditioning")
        return {}

    def constrain(
        self, latents: Tensor, frames: tuple[int, ...], t: int | None, trajectory: Trajectory
    ) -> Tensor:
        self.at("constrain")
        return latents


class RaisingKernel(NNField):
    def correspond(self, source: Tensor, keys: Tensor, window: Window) -> Correspondence:
        raise KeyError("place")


def edit(backbone: Backbone, clip: Clip, editor: Editor, kernel: Propagation | None = None) -> None:
    settings = Settings(steps=1, keyframe_every=4)
    edit_clip(backbone, clip, "a ball", editor, kernel or NNField(), settings=settings)


def output(backbone: Backbone) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 8, 16, generator=generator)
    with torch.no_grad():
        return backbone.epsilon(latents, 1, backbone.embed(["", "a"]), backbone.schedule(1))


@pytest.mark.parametrize("where", ["prepare", "start", "edits", "mix", "conditioning", "constrain"])
def test_an_editor_that_raises_is_named_and_the_unet_restored(
    where: str, backbone: Backbone, clip: Clip
) -> None:
    before = output(backbone)
    message = (
        rf"^Raising of tests.test_plugins \(not installed as a plugin\) failed in {where}: "
        r"ZeroDivisionError: two \(test_plugins.py, line \d+\); the plugin is to be mended"
    )
    with pytest.raises(PluginError, match=message) as raised:
        edit(backbone, clip, Raising(where, ZeroDivisionError("two")))
    assert isinstance(raised.value.__cause__, ZeroDivisionError)
    assert torch.equal(output(backbone), before)
    assert not any(module._forward_hooks for module in backbone.unet.modules())


@pytest.mark.parametrize("end", [SystemExit(0), SystemExit("bye")])
def test_a_plugin_does_not_end_the_process(end: SystemExit, backbone: Backbone, clip: Clip) -> None:
    with pytest.raises(PluginError, match=f"Raising of .* failed in start: SystemExit: {end}"):
        edit(backbone, clip, Raising("start", end))


@pytest.mark.parametrize("end", [Interrupted(130), Preempted()])
def test_a_plugin_does_not_keep_a_run_from_ending(
    end: SystemExit, backbone: Backbone, clip: Clip
) -> None:
    with pytest.raises(type(end)) as raised:
        edit(backbone, clip, Raising("start", end))
    assert raised.value is end


def test_a_kernel_that_raises_is_named_and_the_unet_restored(
    backbone: Backbone, clip: Clip
) -> None:
    before = output(backbone)
    with pytest.raises(PluginError, match=r"^RaisingKernel of .* failed in correspond: KeyError"):
        edit(backbone, clip, PnP(), RaisingKernel())
    assert torch.equal(output(backbone), before)


class LateKernel(NNField):
    """Right in the first step, which is checked, and out of range after it."""

    def correspond(self, source: Tensor, keys: Tensor, window: Window) -> Correspondence:
        found = super().correspond(source, keys, window)
        return found if self.flawless else Correspondence(found.indices + 10**6, found.weights)

    flawless = True


def test_a_kernel_that_points_nowhere_later_is_named(backbone: Backbone, clip: Clip) -> None:
    kernel = LateKernel()

    def progress(stage: str, done: int, steps: int) -> None:
        kernel.flawless = stage != "edit" or done == 0

    with pytest.raises(PluginError, match=r"^LateKernel of .* failed in gather: IndexError"):
        edit_clip(
            backbone, clip, "a ball", PnP(), kernel,
            settings=Settings(steps=2, keyframe_every=4), progress=progress,
        )  # fmt: skip


def wrong(**methods: Any) -> Editor:
    """A PnP some of whose methods are others."""
    return type("Wrong", (PnP,), methods)()


def edit_of(unet: UNet2DConditionModel, function: Any) -> list[Edit]:
    return [Edit(unet.up_blocks[1].resnets[1].conv2, function)]


def late(self: Editor, unet: UNet2DConditionModel) -> Iterator[Edit]:
    yield from edit_of(unet, lambda edited, source: edited)
    raise KeyError("late")


RESIDUALS = {
    "mid_block_additional_residual": torch.zeros(7, 16, 1, 2),
    "down_block_additional_residuals": [torch.zeros(1)] * 12,
}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"start": lambda *_: None}, "in start: expected a Start, got NoneType"),
    (
        {"start": lambda _, source, schedule, seed: Start(source.clean[1:], schedule.timesteps)},
        r"in start: expected first latents of shape \(9, 4, 8, 16\), got \(8, 4, 8, 16\)",
    ),
    (
        {"start": lambda _, source, schedule, seed: Start(source.clean / 0, schedule.timesteps)},
        "in start: expected finite first latents",
    ),
    (
        {"start": lambda _, source, schedule, seed: Start(source.clean, (17,))},
        r"in start: expected the schedule's timesteps \(1,\), or a tail of them, got \(17,\)",
    ),
    (
        {"start": lambda _, source, schedule, seed: Start(source.clean, ())},
        r"or a tail of them, got \(\)",
    ),
    ({"edits": lambda *_: None}, "failed in .*: TypeError: 'NoneType' object is not iterable"),
    ({"edits": lambda _, unet: [unet]}, "in edits: expected Edits of the UNet's modules"),
    ({"edits": late}, "failed in late: KeyError: 'late'"),
    (
        {"edits": lambda _, unet: edit_of(unet, lambda edited, source: edited[:1])},
        r"in an edit: expected the edited output of shape \(2, \d, .*, got \(1, ",
    ),
    (
        {"edits": lambda _, unet: edit_of(unet, lambda edited, source: edited.double())},
        "in an edit: expected the edited output of dtype torch.float32, got torch.float64",
    ),
    (
        {"edits": lambda _, unet: [Edit(unet.down_blocks[0], lambda edited, source: edited)]},
        "edit's module must put out a tensor: expected another than CrossAttnDownBlock2D, got tup",
    ),
    ({"conditioning": lambda *_: None}, "in conditioning: expected a dict of UNet arguments"),
    ({"conditioning": lambda *_: {"sample": 1}}, r"in conditioning: .*, got \['sample'\]"),
    (
        {"conditioning": lambda _, it: RESIDUALS if len(it.branches) > 1 else {}},
        "failed in epsilon: RuntimeError: The size of tensor a",
    ),
    ({"conditioning": lambda *_: RESIDUALS}, "failed in epsilon: RuntimeError: The size of tensor"),
    ({"constrain": lambda *_: None}, "in constrain: expected latents .* in a tensor, got NoneType"),
    ({"constrain": lambda _, x, *__: x[:1]}, r"in constrain: .*, got \(1, 4, 8, 16\)"),
]


@pytest.mark.parametrize(("methods", "message"), WRONG)
def test_an_editors_wrong_answer_names_it_and_the_unet_is_restored(
    methods: dict[str, Any], message: str, backbone: Backbone, clip: Clip
) -> None:
    before = output(backbone)
    with pytest.raises(PluginError, match=message):
        edit(backbone, clip, wrong(**methods))
    assert torch.equal(output(backbone), before)


def test_edits_may_be_a_generator(backbone: Backbone, clip: Clip) -> None:
    asked: list[str] = []

    def edits(self: Editor, unet: UNet2DConditionModel) -> Iterator[Edit]:
        for edit in PnP().edits(unet):
            asked.append(type(edit.module).__name__)
            yield edit

    edit(backbone, clip, wrong(edits=edits))
    assert len(asked) == len(PnP().edits(backbone.unet))


class Flow(OpticalFlow):
    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def between(self, clip: Clip, start: int, end: int) -> Any:
        return self.answer(clip)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            lambda clip: clip.nonsense,
            r"^Flow of tests.* failed in motion: AttributeError: .*mended$",
        ),
        (lambda clip: None, "^Flow from frame . to . is no flow: expected a tensor .*got NoneType"),
        (lambda clip: clip.frames[0].numpy(), "is no flow: .*, got ndarray"),
        (lambda clip: torch.zeros(2, 16, 32).int(), "is no flow: .*, got torch.int32"),
    ],
)
def test_a_flow_that_is_none_is_named(
    answer: Any, message: str, backbone: Backbone, clip: Clip
) -> None:
    with pytest.raises(InputError, match=message):
        edit(backbone, clip, PnP(), FlowWeighted(Flow(answer)))


@pytest.mark.parametrize("where", ["prepare", "mix"])
def test_what_a_plugin_tells_the_user_passes_unchanged(
    where: str, backbone: Backbone, clip: Clip
) -> None:
    told = InputError("give another mask")
    with pytest.raises(InputError) as raised:
        edit(backbone, clip, Raising(where, told))
    assert raised.value is told


def test_the_command_line_names_the_package_of_a_plugin_that_raises(
    broken: None, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out = run(
        [
            "predict", "--data.video=tokenflow/miniature/demo/blue_ball.mp4",
            "--data.max_frames=1", "--data.resolution=16", "--model.prompt=a ball",
            f"--model.backbone={model_folder}", "--model.steps=1", "--model.editor=Crashing",
            f"--output.folder={tmp_path / 'runs'}", "--trainer.accelerator=cpu",
        ],
        capsys,
    )  # fmt: skip
    assert code == 2
    assert "Crashing of tokenflow-broken 0.3 failed in conditioning: AttributeError: " in out
    assert "Traceback" not in out
    assert not (tmp_path / "runs").exists()


def test_a_constructor_does_not_end_the_process_in_silence(
    broken: None, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["predict", "--data.video=gone.mp4", "--model.prompt=a ball", "--model.editor=Ending"]
    code, out = run(words, capsys)
    assert code == 2
    assert "the configuration cannot be used: SystemExit: 0" in out
    code, out = run(["plugins", "check", "Ending"], capsys)
    assert code == 1
    assert "FAILED  it cannot be made with these options: SystemExit: 0" in out
