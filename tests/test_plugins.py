"""Plugins as they are found, listed, checked, chosen and blamed."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import EntryPoint, version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import ROOT
from tests.installing import install
from tokenflow import plugins
from tokenflow.cli.main import main
from tokenflow.diffusion import Backbone, Conditioning, Schedule, Site, Source
from tokenflow.editors import Batch, Editor, Injection, PnP, Processor, Prompts, Start, Step
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


class First(PnP):
    interface = 1


class FirstKernel(NNField):
    interface = 1


class Later(PnP):
    interface = "1"  # type: ignore[assignment]


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
        ("Old", "tests.test_plugins:Old", "interface 0 of Editor, this is interface 2"),
        ("Later", "tests.test_plugins:Later", "interface '1' of Editor, this is interface 2"),
        ("Silent", "tests.test_plugins:Silent", "add interface = 2 to the class"),
    ],
)
def test_an_unusable_plugin_is_listed_with_its_reason(name: str, value: str, reason: str) -> None:
    plugin = load(EntryPoint(name, value, "tokenflow.editors"))
    assert plugin.kind is None
    assert reason in plugin.reason
    assert f"unusable: {name} of unknown distribution: " in describe([plugin])


EDITOR = {
    "edits": "injections", "conditioning(forward)": "model_inputs", "constrain": "advance",
    "content": "cache_key",
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "base", "renamed"),
    [("First", Editor, EDITOR), ("FirstKernel", Propagation, {"content": "cache_key"})],
)
def test_a_plugin_of_interface_1_is_refused_with_what_has_changed(
    name: str, base: Any, renamed: dict[str, str]
) -> None:
    group = "tokenflow.editors" if base is Editor else "tokenflow.propagation"
    reason = load(EntryPoint(name, f"tests.test_plugins:{name}", group)).reason
    said = f"it was written for interface 1 of {base.__name__}, this is interface 2: "
    assert reason.startswith(said)
    for old, new in renamed.items():
        assert old in reason
        assert new in reason
        assert callable(getattr(base, new))
    assert (ROOT / reason.split()[-1]).is_file()


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
Fitting = broken:Fitting
Ending = broken:Ending
Wrong = broken:Missing
[tokenflow.propagation]
Wrong = broken:Wrong
Asking = broken:Asking
Outdated = broken:Asking
"""
MODULE = """
from abc import abstractmethod

from tokenflow.diffusion import ModelError
from tokenflow.editors import Editor, PnP
from tokenflow.propagation import Correspondence, NNField

class Outdated(PnP):
    interface = 0

class Wrong(NNField):
    interface = 2
    def correspond(self, source, keys, window):
        found = super().correspond(source, keys, window)
        return Correspondence(found.indices, found.weights * 2)

class Asking(NNField):
    interface = 2
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
    interface = 2
    @abstractmethod
    def missing(self):
        pass

class Failing(PnP):
    interface = 2
    def __init__(self, a: int = 1) -> None:
        raise KeyError("boom")

class OwnModel(PnP):
    interface = 2
    def __init__(self, backbone: str = "x") -> None:
        raise ValueError(f"own model {backbone}")

class Ending(PnP):
    interface = 2
    def __init__(self) -> None:
        raise SystemExit(0)

class Crashing(PnP):
    interface = 2
    def model_inputs(self, batch):
        return {"timestep_cond": batch.nonsense}

class Fitting(PnP):
    interface = 2
    def prepare(self, model, clip):
        raise ModelError(f"frames of {tuple(clip.frames.shape[2:])}")
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
    for kind in vars(sys.modules.pop("broken", None) or object).copy().values():
        if getattr(kind, "__module__", "") == "broken":
            kind.__name__ = kind.__qualname__ = "Gone"  # it may live on, but is no other's namesake


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
    assert "unusable: it was written for interface 0 of Editor, this is interface 2" in outdated
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
            ["Fitting"],
            2,
            [
                "tokenflow: error: Fitting of tokenflow-broken 0.3 does not fit the model",
                "checked on: frames of (16, 32); name one that it fits with --backbone, a fold",
            ],
        ),
        (["Fitting", "--backbone=miniature"], 2, ["checked on: frames of (32, 64); name one"]),
        (["OwnModel", "--backbone=y"], 1, ["options: ValueError: own model y"]),
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
        text = f"from tokenflow.editors import PnP as P\n\nclass {name}(P):\n    interface = 2\n"
        (tmp_path / f"{package}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    installed_plugins.cache_clear()
    yield
    installed_plugins.cache_clear()
    for package, name in offered.items():
        if (module := sys.modules.pop(package, None)) is not None:
            # jsonargparse keeps the class, whose name would go on to clash in other tests
            getattr(module, name).__qualname__ = f"Gone{name}"


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
    assert "Injection threshold: the share of the steps" in out


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

    def branches(self, prompts: Prompts) -> Mapping[str, str]:
        self.at("branches")
        return super().branches(prompts)

    def start(self, source: Source, schedule: Schedule, seed: int) -> Start:
        self.at("start")
        return super().start(source, schedule, seed)

    def inputs(self, x: Tensor, step: Step, source: Source) -> Tensor:
        self.at("inputs")
        return super().inputs(x, step, source)

    def conditioning(self, batch: Batch) -> Conditioning:
        if not batch.inversion:
            self.at("conditioning")
        return batch.conditioning

    def model_inputs(self, batch: Batch) -> dict[str, Any]:
        if not batch.inversion:
            self.at("model_inputs")
        return {}

    def injections(self, model: Backbone) -> Sequence[Injection]:
        self.at("injections")
        return [*super().injections(model), Injection("up_blocks.2.resnets.1.conv2", self.mix)]

    def mix(self, edited: Tensor, source: Tensor, batch: Batch) -> Tensor:
        self.at("an injection")
        return edited

    def cross_attention(self, model: Backbone) -> Mapping[str, Processor]:
        self.at("cross_attention")
        return dict.fromkeys(model.cross_attention(), self.attend)

    def attend(self, batch: Batch, site: Site, x: Tensor, *_: Any, **given: Any) -> Tensor:
        self.at("attend")
        return site.plain(x, **given)

    def advance(self, x: Tensor, outputs: Any, step: Step, source: Source) -> Tensor:
        self.at("advance")
        return x


class RaisingKernel(NNField):
    def correspond(self, source: Tensor, keys: Tensor, window: Window) -> Correspondence:
        raise KeyError("place")


def edit(backbone: Backbone, clip: Clip, editor: Editor, kernel: Propagation | None = None) -> None:
    settings = Settings(steps=1, keyframe_every=4)
    edit_clip(backbone, clip, "a ball", editor, kernel or NNField(), settings)


def output(backbone: Backbone) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 8, 16, generator=generator)
    with torch.no_grad():
        return backbone.predict(latents, 1, backbone.embed(["", "a"]))


WHERE = [
    "branches", "prepare", "start", "inputs", "conditioning", "model_inputs", "injections",
    "an injection", "cross_attention", "attend", "advance",
]  # fmt: skip


@pytest.mark.parametrize("where", WHERE)
def test_an_editor_that_raises_is_named_and_the_network_restored(
    where: str, backbone: Backbone, clip: Clip
) -> None:
    before = output(backbone)
    method = where.replace("attend", "cross_attention")
    message = (
        rf"^Raising of tests.test_plugins \(not installed as a plugin\) failed in {method}: "
        r"ZeroDivisionError: two \(test_plugins.py, line \d+\); fix the plugin"
    )
    with pytest.raises(PluginError, match=message) as raised:
        edit(backbone, clip, Raising(where, ZeroDivisionError("two")))
    assert isinstance(raised.value.__cause__, ZeroDivisionError)
    assert torch.equal(output(backbone), before)
    assert not any(module._forward_hooks for module in backbone.network.modules())


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
    assert raised.value.code == end.code


def test_a_kernel_that_raises_is_named_and_the_network_restored(
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

    def on_step(stage: str, step: int, steps: int) -> None:
        kernel.flawless = stage != "edit"

    with pytest.raises(
        PluginError, match=r"^LateKernel of .* failed in gather: RuntimeError: Index"
    ):
        edit_clip(
            backbone, clip, "a ball", PnP(), kernel, Settings(steps=2, keyframe_every=4),
            on_step=on_step,
        )  # fmt: skip


def wrong(**methods: Any) -> Editor:
    """A PnP some of whose methods are others."""
    return type("Wrong", (PnP,), methods)()


LAYER = "up_blocks.1.resnets.1.conv2"


def inject(function: Any, layer: str = LAYER) -> dict[str, Any]:
    return {"injections": lambda self, model: [Injection(layer, function)]}


def late(self: Editor, model: Backbone) -> Iterator[Injection]:
    yield Injection(LAYER, lambda edited, source, batch: edited)
    raise KeyError("late")


RESIDUALS = {
    "mid_block_additional_residual": torch.zeros(7, 16, 1, 2),
    "down_block_additional_residuals": [torch.zeros(1)] * 8,
}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"branches": lambda *_: {}}, "in branches: expected a dict of branches and their prompts"),
    ({"start": lambda *_: None}, "in start: expected a Start, got NoneType"),
    (
        {"start": lambda _, source, *__: Start(source.clean[1:])},
        r"in start: expected first latents of shape \(9, 4, 8, 16\), got \(8, 4, 8, 16\)",
    ),
    (
        {"start": lambda _, source, *__: Start(source.clean / 0)},
        "in start: expected finite first latents",
    ),
    (
        {"start": lambda _, source, *__: Start(source.clean, 1)},
        "in start: expected a step from 0 to 0, got 1",
    ),
    (
        {"inputs": lambda _, x, *__: x},
        r"in inputs: expected inputs of all branches of shape \(3, ",
    ),
    ({"injections": lambda *_: None}, "in injections: TypeError: 'NoneType' object is not iterab"),
    ({"injections": lambda *_: [1]}, "in injections: expected Injections .* got 1 as number 0"),
    ({"injections": late}, "failed in injections: KeyError: 'late'"),
    (
        inject(lambda edited, source, batch: edited[:1]),
        r"in an injection: expected the edited output of shape \(2, \d, .*, got \(1, ",
    ),
    (
        inject(lambda edited, source, batch: edited.double()),
        "in an injection: expected the edited output of dtype torch.float32, got torch.float64",
    ),
    (
        inject(lambda edited, source, batch: edited, "down_blocks.0"),
        "layer must put out a tensor: expected another than down_blocks.0, a CrossAttnDownBlock2D",
    ),
    ({"conditioning": lambda *_: {}}, "in conditioning: expected a Conditioning, got dict"),
    ({"model_inputs": lambda *_: None}, "in model_inputs: expected a dict of network inputs, got"),
    ({"model_inputs": lambda *_: {"sample": 1}}, r"in model_inputs: .*, got \['sample'\]"),
    (
        {"model_inputs": lambda _, batch: {} if batch.inversion else RESIDUALS},
        "failed in model_inputs: RuntimeError: The size of tensor a",
    ),
    ({"model_inputs": lambda *_: RESIDUALS}, "in model_inputs: RuntimeError: The size of tensor"),
    (
        {"cross_attention": lambda *_: {"attn": 1}},
        r"in cross_attention: .*, got \['attn'\]",
    ),
    (
        {
            "cross_attention": lambda _, model: dict.fromkeys(
                model.cross_attention(), lambda *_, **__: 1
            )
        },
        "in cross_attention: expected the layer's output in a tensor, got int",
    ),
    ({"advance": lambda *_: None}, "in advance: expected latents .* in a tensor, got NoneType"),
    ({"advance": lambda _, x, *__: x[:1]}, r"in advance: .*, got \(1, 4, 8, 16\)"),
]


@pytest.mark.parametrize(("methods", "message"), WRONG)
def test_an_editors_wrong_answer_names_it_and_the_network_is_restored(
    methods: dict[str, Any], message: str, backbone: Backbone, clip: Clip
) -> None:
    before = output(backbone)
    with pytest.raises(PluginError, match=message):
        edit(backbone, clip, wrong(**methods))
    assert torch.equal(output(backbone), before)


def test_injections_may_be_a_generator(backbone: Backbone, clip: Clip) -> None:
    asked: list[str] = []

    def injections(self: Editor, model: Backbone) -> Iterator[Injection]:
        for one in PnP().injections(model):
            asked.append(one.layer)
            yield one

    edit(backbone, clip, wrong(injections=injections))
    assert asked == [one.layer for one in PnP().injections(backbone)]


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
            r"^Flow of tests.* failed in motion: AttributeError: .*fix the plugin$",
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


@pytest.mark.parametrize("where", ["prepare", "an injection"])
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
    assert "Crashing of tokenflow-broken 0.3 failed in model_inputs: AttributeError: " in out
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
