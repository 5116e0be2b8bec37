"""A manifest whose rows choose editor, kernel and mask, and a grid that makes a sweep."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path

import pytest
import torch
import yaml

from tokenflow.cli.choices import Choices
from tokenflow.cli.main import main
from tokenflow.editors import ControlNet, PnP, SDEdit
from tokenflow.engine.lightning.job import Choice, ClipSource, Job
from tokenflow.engine.lightning.manifest import MOST, read_manifest
from tokenflow.engine.lightning.module import TokenFlowModule
from tokenflow.errors import InputError
from tokenflow.propagation import FlowWeighted, NNField
from tokenflow.report import read_run
from tokenflow.video import Clip, write_clip

RUN = {
    "editor": {"class_path": "tokenflow.PnP", "init_args": {"attention": 0.25}},
    "propagation": {"class_path": "tokenflow.NNField"},
}


def manifest(folder: Path, text: str, name: str = "clips.yaml") -> Path:
    (folder / name).write_text(text)
    return folder / name


def test_a_grid_is_the_product_of_its_values(tmp_path: Path) -> None:
    text = """
- video: a.mp4
  steps: 5
  grid:
    seed: [1, 2]
    editor: [PnP, {class_path: tokenflow.SDEdit, init_args: {strength: 0.5}}]
    prompt: [a red ball, a/b, 'a:b', null]
"""
    jobs = read_manifest(manifest(tmp_path, text), None, {})
    assert len(jobs) == len({job.name for job in jobs}) == 16
    assert {job.settings["seed"] for job in jobs} == {1, 2}
    assert all(job.settings["steps"] == 5 for job in jobs)
    assert [job.name for job in jobs[:4]] == [
        "a_seed=1_editor=PnP_prompt=a-red-ball",
        "a_seed=1_editor=PnP_prompt=a-b-2",  # two values that read alike
        "a_seed=1_editor=PnP_prompt=a-b-3",
        "a_seed=1_editor=PnP_prompt=None",
    ]
    assert jobs[-1].prompts == {}
    assert jobs[-1].name == "a_seed=2_editor=SDEdit-strength-0.5_prompt=None"
    spec = jobs[-1].plugins["editor"].spec
    assert spec == {"class_path": "tokenflow.SDEdit", "init_args": {"strength": 0.5}}


BAD = {
    "no mapping": ("grid: [1]", "expected a grid of options with a list of values each"),
    "nothing": ("grid: {}", "expected a grid of options"),
    "one value": ("grid: {seed: 1}", "expected a grid of options"),
    "no value": ("grid: {seed: []}", "expected a grid of options"),
    "the video": ("grid: {video: [b.mp4]}", "'video' cannot be in the grid"),
    "twice": ("seed: 1, grid: {seed: [1]}", "'seed' cannot be in the grid"),
    "a grid": ("grid: {grid: [1]}", "'grid' cannot be in the grid"),
    "an unknown name": ("grid: {stepz: [1]}", "'stepz' is no option; did you mean steps; expected"),
    "too many": (f"grid: {{seed: {[*range(101)]}, span: {[*range(1, 101)]}}}", f"at most {MOST}"),
    "an editor that is none": ("editor: [PnP]", "expected editor as a class name, or class_path"),
    "arguments that are none": ("editor: {init_args: 3}", "expected init_args of editor"),
    "an option's name that is no text": ("editor: {init_args: {1: 2}}", "init_args of editor as a"),
    "more than a class": ("editor: {class_path: PnP, dict_kwargs: {}}", "expected editor as a"),
    "a mask outside": ("mask: ../mask.mp4", "mask.mp4 lies outside of"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row(case: str, tmp_path: Path) -> None:
    text, message = BAD[case]
    with pytest.raises(InputError, match=f"clip 1: .*{message}"):
        read_manifest(manifest(tmp_path, f"- {{video: a.mp4, {text}}}"), None, {})


def test_an_unknown_key_lists_what_is_accepted(tmp_path: Path) -> None:
    with pytest.raises(InputError) as raised:
        read_manifest(manifest(tmp_path, "- {video: a.mp4, kernel: x}"), None, {})
    for name in ("mask", "prompt", "seed", "editor", "editor.OPTION", "propagation", "grid"):
        assert f", {name}" in str(raised.value)


def test_columns_of_a_csv_file_are_an_editors_options(tmp_path: Path) -> None:
    text = "video,editor,editor.strength\na.mp4,SDEdit,0.5\nb.mp4,,\n"
    one, two = read_manifest(manifest(tmp_path, text, "clips.csv"), None, {})
    Choices(RUN).settle(one)
    editor = one.plugins["editor"].make()
    assert isinstance(editor, SDEdit)
    assert editor.strength == 0.5
    assert two.plugins == {}


def test_choices_are_completed_as_a_configuration_is() -> None:
    choices, made = Choices(RUN), []
    for spec in (
        {"init_args": {"features": 0.5}},  # of the run's own editor
        {"class_path": "ControlNet", "init_args": {"condition": {"class_path": "Canny"}}},
    ):
        job = Job(
            ClipSource(Path("a.mp4")), plugins={"editor": Choice(spec, Path())}, where="clip 1"
        )
        choices.settle(job)
        made.append(job.plugins["editor"])
    pnp, net = (choice.make() for choice in made)
    assert isinstance(pnp, PnP)
    assert (pnp.attention, pnp.features) == (0.25, 0.5)
    assert isinstance(net, ControlNet)
    assert made[0].spec["init_args"]["start_from"] == "inverted"  # the default, for the record
    assert made[0].described != made[1].described


def test_a_plugin_is_kept_for_the_next_row_that_chooses_alike_and_for_no_other() -> None:
    module, choices, rows = TokenFlowModule(PnP(), NNField()), Choices(RUN), []
    canny = {"class_path": "ControlNet", "init_args": {"condition": {"class_path": "Canny"}}}
    for spec in (canny, canny, None, canny):
        plugins = {} if spec is None else {"editor": Choice(spec, Path())}
        rows.append(Job(ClipSource(Path("a.mp4")), plugins=plugins, where="clip 1"))
        choices.settle(rows[-1])
    first, _ = module.plugins_of(rows[0])
    assert module.plugins_of(rows[1]) == (first, module.propagation)  # its network is loaded once
    kept = weakref.ref(first)
    del first
    assert module.plugins_of(rows[2]) == (module.editor, module.propagation)
    gc.collect()
    assert kept() is None
    assert isinstance(module.plugins_of(rows[3])[0], ControlNet)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"class_path": "Pnp"}, "there is no editor 'Pnp'; did you mean PnP; installed are"),
        (
            {"class_path": "PnP", "init_args": {"atention": 1}},
            "PnP has no option 'atention'; did you mean attention; its options are attention, ",
        ),
        ({"class_path": "PnP", "init_args": {"attention": "x"}}, 'key "attention":.*a .*float'),
        ({"class_path": "PnP", "init_args": {"attention": 3}}, "clip 7: .*attention"),
        ({"class_path": "tokenflow.NNField"}, "does not correspond to a subclass of Editor"),
    ],
)
def test_a_choice_that_cannot_be_made(spec: dict[str, object], message: str) -> None:
    job = Job(ClipSource(Path("a.mp4")), plugins={"editor": Choice(spec, Path())}, where="clip 7")
    with pytest.raises(InputError, match=f"(?s)clip 7: .*{message}|{message}"):
        Choices(RUN).settle(job)


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """A clip of six frames with a mask of the same length."""
    ramp = torch.linspace(0, 1, 32)
    frames = torch.stack([((ramp + i / 12) % 1).expand(3, 16, 32) for i in range(6)])
    mask = torch.zeros(6, 3, 16, 32)
    for number in range(6):
        mask[number, ..., : 4 + number] = 1
    write_clip(tmp_path / "in.mp4", Clip.from_frames(frames), crf=0)
    write_clip(tmp_path / "mask.mp4", Clip.from_frames(mask), crf=0)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    return tmp_path


@pytest.mark.full
def test_a_sweep_is_edited_and_recorded(
    clips: Path,
    model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = """
- {video: in.mp4, mask: mask.mp4, start: 1, stop: 5, grid: {editor.attention: [0.0, 1.0]}}
- {video: in.mp4, name: other, editor: SDEdit, editor.strength: 0.5, propagation: FlowWeighted}
- {video: broken.mp4}
"""
    manifest(clips, text)
    monkeypatch.chdir(clips)
    with pytest.raises(SystemExit) as exit:
        main([
            "predict", "--data.manifest=clips.yaml", f"--model.backbone={model_folder}",
            "--model.prompt=a ball", "--model.steps=2", "--model.keyframe_every=2",
            "--output.folder=runs", "--model.cache=cache", "--trainer.accelerator=cpu",
            "--metrics.measure=true", "--metrics.distances=1",
        ])  # fmt: skip
    out, err = capsys.readouterr()
    assert exit.value.code == 1
    # what cannot be opened is said before the first pass
    assert err.index(f"clip 3 will fail: {clips / 'broken.mp4'}") < err.index("encode")
    done = read_run("runs/in_editor.attention=0.0"), read_run("runs/in_editor.attention=1.0")
    assert f"{done[0].folder}: see {done[0].folder / 'report.html'}\n" in out
    assert [run.settings["editor.attention"] for run in done] == [0.0, 1.0]
    assert done[0].came["mask"] == str(clips / "mask.mp4")
    other = read_run("runs/other").settings
    assert other["editor"].split(".")[-1] == SDEdit.__name__
    assert other["propagation"].split(".")[-1] == FlowWeighted.__name__
    assert other["editor.strength"] == 0.5
    assert "editor.attention" not in other
    # the mask was cut as the clip was
    assert all(run.metrics["psnr_outside"] != run.metrics["psnr"] for run in done)
    # from elsewhere, with the mask that the record names
    (clips / "elsewhere").mkdir()
    monkeypatch.chdir(clips / "elsewhere")
    main(["evaluate", "../runs/in_editor.attention=1.0", "--distances=[1]"])
    found = json.loads((clips / done[1].folder / "metrics.json").read_text())
    assert found["options"]["mask"] == str(clips / "mask.mp4")
    record = yaml.safe_load((clips / "runs" / "other" / "run.yaml").read_text())
    assert record["run"]["typed"]["data.manifest"] == "clips.yaml"
    # of a row, the record is a configuration that edits it alone
    assert record["data"]["manifest"] is None
    for row in ("other", "in_editor.attention=1.0"):
        again = clips / f"again {row}"
        words = [f"--config={clips / 'runs' / row / 'run.yaml'}", f"--output.folder={again}"]
        main(["predict", *words, f"--model.cache={clips / 'empty'}"])
        assert [folder.name for folder in again.iterdir()] == ["in"]
        first, second = (read_run(str(f)) for f in (clips / "runs" / row, again / "in"))
        assert torch.equal(first.edited().frames[:], second.edited().frames[:])
        assert first.settings["editor"] == second.settings["editor"]
