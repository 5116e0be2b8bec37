"""The command line as users meet it: a process, its words, its files."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.conftest import ROOT
from tests.installing import install
from tests.video.making import beeps, make_video, noise
from tokenflow.cli import doctor
from tokenflow.cli.main import COMMANDS, main
from tokenflow.diffusion import StableDiffusion
from tokenflow.video import Clip, read_clip, write_clip, write_image


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six small frames with a moving gradient, which h264 keeps well."""
    ramp = torch.linspace(0, 1, 32)
    frames = torch.stack([(ramp + i / 12).clamp(0, 1).expand(3, 16, 32) for i in range(6)])
    folder = tmp_path_factory.mktemp("video")
    return write_clip(folder / "ramp.mp4", Clip.from_frames(frames))


def small_run(video: Path, model_folder: Path, output: Path) -> list[str]:
    """A command line that works."""
    return [
        "predict",
        f"--data.video={video}",
        f"--model.backbone={model_folder}",
        "--model.prompt=a blue ball",
        "--model.steps=2",
        "--model.keyframe_every=4",
        f"--output.folder={output}",
        "--trainer.accelerator=cpu",
    ]


@pytest.fixture
def words(video: Path, model_folder: Path, tmp_path: Path) -> list[str]:
    """A small run that works."""
    return small_run(video, model_folder, tmp_path / "runs")


@pytest.fixture(scope="module")
def finished(video: Path, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of such a run, for tests that leave it as it is."""
    folder = tmp_path_factory.mktemp("finished")
    main([*small_run(video, model_folder, folder / "runs"), f"--model.cache={folder / 'cache'}"])
    return folder / "runs" / "ramp"


def test_help_is_quick_and_names_the_commands() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "tokenflow.cli.main", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "predict" in done.stdout
    assert "doctor" in done.stdout
    assert " torch" not in done.stderr, "help must not wait for torch"


def test_predict_help_starts_with_what_a_user_needs() -> None:
    # in a process of its own: the help names all plugins' classes, and other tests define some
    command = [sys.executable, "-m", "tokenflow.cli.main", "predict", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert text.index("--data.video") < text.index("--model.prompt") < text.index("--trainer.")
    assert "Scale of classifier-free guidance" in text
    assert "--trainer.devices" in text
    assert "--trainer.max_epochs" not in text  # accepted, but nobody edits by it
    assert len(text.splitlines()) < 240


def test_a_run_leaves_its_files(finished: Path, video: Path) -> None:
    assert sorted(p.name for p in finished.iterdir()) == [
        "compare.mp4",
        "contact_sheet.png",
        "edited.mp4",
        "features.json",
        "report.html",
        "run.yaml",
    ]
    source, edited = read_clip(video), read_clip(finished / "edited.mp4")
    assert edited.frames.shape == source.frames.shape
    assert edited.times == source.times
    assert read_clip(finished / "compare.mp4").frames.shape[-1] > 2 * source.frames.shape[-1]
    summary = yaml.safe_load((finished / "run.yaml").read_text())
    assert summary["model"]["editor"]["class_path"].endswith("PnP")
    assert summary["model"]["steps"] == 2
    assert {"encode", "invert", "edit", "decode"} <= set(summary["run"]["seconds"])
    assert summary["run"]["versions"]["torch"] == version("torch")
    assert summary["run"]["device"] == "cpu"
    assert summary["run"]["dtype"] == "float32"
    assert summary["run"]["inversion_steps"] == 2
    assert summary["run"]["editor"] == f"tokenflow {version('tokenflow')}"
    assert summary["run"]["propagation"] == f"tokenflow {version('tokenflow')}"


def test_a_finished_run_is_not_overwritten_unasked(
    finished: Path, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "runs" / "ramp"))
    file = run / "edited.mp4"
    before = file.stat().st_mtime_ns
    with pytest.raises(SystemExit) as exit:
        main(words)
    assert exit.value.code == 2
    assert "holds a finished run" in capsys.readouterr().err
    assert file.stat().st_mtime_ns == before
    main([*words, "--output.overwrite=true"])
    assert file.stat().st_mtime_ns > before
    with pytest.raises(SystemExit):  # nor is it by its own run.yaml
        main(["predict", f"--config={finished / 'run.yaml'}"])
    assert "holds a finished run" in capsys.readouterr().err


def test_a_configuration_file_chooses_the_editor_by_name(words: list[str], tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    editor = {"class_path": "PnP", "init_args": {"attention": 0.25}}
    config.write_text(yaml.safe_dump({"model": {"editor": editor, "consistency": "joint"}}))
    main(["predict", f"--config={config}", *words[1:]])
    summary = yaml.safe_load((tmp_path / "runs" / "ramp" / "run.yaml").read_text())
    assert summary["model"]["editor"]["init_args"]["attention"] == 0.25
    assert summary["model"]["consistency"] == "joint"


def test_run_yaml_repeats_the_run(finished: Path, tmp_path: Path) -> None:
    cache = f"--model.cache={tmp_path / 'cache'}"  # an empty one: nothing comes from the first run
    main(["predict", f"--config={finished / 'run.yaml'}", f"--output.folder={tmp_path}", cache])
    frames = [read_clip(run / "edited.mp4").frames for run in (finished, tmp_path / "ramp")]
    assert torch.equal(frames[0], frames[1])


# ControlNets and IP-Adapters must fit their backbone: tests/editors/test_controlnet.py runs the
# first's configuration, test_configurations.py parses the second's
CONFIGS = sorted(
    p for p in (ROOT / "configs").glob("*.yaml") if p.stem not in ("controlnet", "ip_adapter")
)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda p: p.stem)
def test_the_configurations_run(config: Path, words: list[str], tmp_path: Path) -> None:
    quick = ["--data.resolution=16"]
    if config.stem not in ("ddcm", "flowedit"):  # which do not invert
        quick.append("--model.inversion_steps=3")
    if config.stem == "flowedit":  # of fewer steps than it says
        quick.append("--model.editor.n_max=2")
    main(["predict", f"--config={config}", *words[1:], *quick])
    summary = yaml.safe_load((tmp_path / "runs" / "ramp" / "run.yaml").read_text())
    written = yaml.safe_load(config.read_text())["model"]
    assert summary["model"]["guidance"] == written.get("guidance")
    assert summary["run"]["guidance"] == (written.get("guidance") or 7.5)


def test_the_reference_configuration_is_the_published_code(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main(["predict", f"--config={ROOT / 'configs' / 'reference.yaml'}", "--print_config"])
    model = yaml.safe_load(capsys.readouterr().out)["model"]
    assert model["editor"] == {
        "class_path": "tokenflow.PnP",
        "init_args": {
            "attention": 0.5,
            "features": 0.8,
            "feature_layers": 1,
            "start_from": "renoised",
            "inject_values": None,
        },
    }
    assert model["propagation"]["class_path"] == "tokenflow.NNField"
    published = {
        "steps": 50,
        "inversion_steps": 500,
        "guidance": 7.5,
        "keyframe_every": 8,
        "keyframes": "random",
        "neighbours": "previous",
        "blend": "sigmoid",
        "fusion": 0.0,
        "consistency": "tokenflow",
        "keyframe_attention": "full",
    }
    assert {name: model[name] for name in published} == published


def test_the_output_never_lands_in_its_source(
    words: list[str], video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    for i in range(2):
        write_image(images / f"{i}.png", torch.rand(3, 16, 32))
    with pytest.raises(SystemExit):
        main([*words, f"--data.video={images}", f"--output.folder={tmp_path}"])
    assert "choose another --output.folder" in capsys.readouterr().err
    assert sorted(p.name for p in images.iterdir()) == ["0.png", "1.png"]


# SIGUSR1 is sent to launchers' ranks in test_cluster.py
@pytest.mark.parametrize(
    ("sent", "code"),
    [(signal.SIGTERM, 75), pytest.param(signal.SIGINT, 130, marks=pytest.mark.full)],
)
def test_a_signal_ends_a_run_and_leaves_nothing_half_written(
    sent: signal.Signals, code: int, words: list[str], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "tokenflow.cli.main", *words, "--model.steps=900"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as run:
        assert run.stderr is not None
        for line in run.stderr:
            if line.startswith("encode"):
                run.send_signal(sent)
                break
        assert ("tokenflow: interrupted\n" in run.stderr.read()) is (sent == signal.SIGINT)
        assert run.wait(timeout=60) == code
    assert not (tmp_path / "runs").exists()


DEMO = ROOT / "tokenflow" / "miniature" / "demo" / "blue_ball.mp4"
BAD = {
    "an unknown editor": (["--model.editor=Pnp"], "installed are: "),
    "an unknown kernel": (["--model.propagation=Flow"], "NNField"),
    "an empty prompt": (["--model.prompt= "], "prompt is empty"),
    "a video and a manifest": (["--data.manifest=clips.yaml"], "got both"),
    "no manifest": (["--data.video=null", "--data.manifest=gone.csv"], "cannot be read"),
    "no step between keeping": (["--model.save_every=0"], "at least 1 step"),
    "a cache that is a file": (["--model.cache=/dev/null"], "choose another --model.cache"),
    "a cache of nothing": (["--model.cache_gigabytes=0"], "more than 0 gigabytes"),
    "several ranks for one": (["--model.ranks_per_clip=2"], "to divide 1, the job's ranks; got 2"),
    "a name that leads out": (["--data.video=...mp4"], "expected the name of a folder"),
    "a missing file": (["--data.video=gone.mp4"], "gone.mp4 does not exist"),
    "a missing model": (["--model.backbone=./gone"], "gone' does not exist"),
    "an unknown hub model": (["--model.backbone=nobody/nothing"], "give its folder"),
    "frames outside": (["--data.start=6"], "6 frames"),
    "too few inversion steps": (["--model.inversion_steps=1"], "at least as many steps"),
    "too many inversion steps": (
        ["--model.inversion_steps=2000"],
        "inversion_steps: expected 1 to 1000",
    ),
    "an unknown policy": (["--model.keyframes=-1"], "offset of 0 or more"),
    "a wrong quality": (["--output.crf=99"], "from 0 to 51"),
    "a file for a folder": (["--output.folder=/dev/null"], "cannot be written"),
    "a strategy that is not installed": (["--trainer.strategy=deepspeed"], "cannot be used"),
    "processes that fork": (
        ["--trainer.strategy=ddp_spawn", "--trainer.devices=2"],
        "strategy ddp",
    ),
    "fusion without keyframes": (
        ["--model.fusion=0.5", "--model.consistency=joint"],
        "expected fusion 0, got 0.5; leave it out",
    ),
    "an end of no fusion": (
        ["--model.editor=FlowEdit", "--model.fusion_end=0.7"],
        "expected fusion_end 1, got 0.7; leave it out",
    ),
    "no window": (["--model.keyframe_every=0"], "keyframe_every must be at least 1"),
    "Lightning's precision": (["--trainer.precision=bf16-true"], "--model.dtype"),
    "a package that is missing": (["--trainer.profiler=xla"], "cannot be used"),
    "an unknown profiler": (
        ["--trainer.profiler=fast"],
        "['simple', 'advanced', 'pytorch', 'xla']",
    ),
    "an option that an editor lacks": (
        ["--model.editor={class_path: PnP, dict_kwargs: {strength: 1}}"],
        "'strength'; dict_kwargs",
    ),
    "a huge resolution": (
        ["--data.resolution=1000000"],
        "at most 67108864 pixels, got 2000000x1000000",
    ),
    "no clip": (["--trainer.limit_predict_batches=0"], "would edit nothing"),
    "an image rate of almost nothing": (["--data.image_rate=1e-9"], "from 0.0001"),
    "a model that is a video": ([f"--model.backbone={DEMO}"], "a *.safetensors file, and"),
    "no model": (["--model.backbone="], "--model.backbone is empty"),
    "no cache's folder": (["--model.cache="], "--model.cache is empty"),
    "no video's path": (["--data.video="], "--data.video is empty"),
    "a part of one video": (["--data.part=2/3"], "--data.manifest"),
    "a root of one video": (["--data.root=/"], "--data.manifest"),
    "no number": (["--model.guidance=.nan"], "guidance must be a finite number"),
    "a video for a configuration": ([f"--config={DEMO}"], "expected a YAML file for --config"),
    "a word of no option": (["--model.stepz=3"], "stepz"),
    "a wrong type": (["--model.steps=many"], "steps"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_says_what_to_do_and_leaves_nothing(
    case: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, message = BAD[case]
    refused([*words, *bad], message, tmp_path, capsys)
    if "--trainer.profiler" in bad[0]:
        # Lightning's half-made profiler fails once more when it is collected; if that happens
        # while the next test's options are found by parsing code, Python 3.11 may fail to parse it
        gc.collect()


@pytest.mark.parametrize("where", ["encode", "embed"])
def test_too_little_memory_for_the_edit(
    where: str,
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("could not create a primitive")

    monkeypatch.setattr(StableDiffusion, where, fail)
    refused(
        words, "not enough memory on cpu for the edit (RuntimeError: could not", tmp_path, capsys
    )


def refused(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Runs a command that must end with this message, and leave nothing."""
    with pytest.raises(SystemExit) as exit:
        main(words)
    assert exit.value.code == 2
    err = capsys.readouterr().err
    assert message in err, err
    assert "Traceback" not in err
    assert not (tmp_path / "runs").exists()


def no_video(path: Path) -> None:
    path.write_bytes(b"not a video at all" * 100)


def no_frames(path: Path) -> None:
    make_video(path, noise(3), sound=beeps([], 1), damage=lambda index, data: b"")


def truncated(path: Path) -> None:
    make_video(path, noise(12), movflags="faststart")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def corrupt(path: Path) -> None:
    def zeros(index: int, data: bytes) -> bytes:
        half = len(data) // 2
        return data[:half] + bytes(len(data) - half) if index == 5 else data

    make_video(path, noise(12), damage=zeros)


@pytest.mark.parametrize(
    "option", ["model.prompt", "model.steps", "model.backbone", "output.folder", "data.start"]
)
def test_an_option_that_a_configuration_leaves_empty(
    option: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    group, name = option.split(".")
    words = [word for word in words if not word.startswith(f"--{option}")]
    (tmp_path / "empty.yaml").write_text(f"{group}:\n  {name}:\n")
    message = f"--{option} is empty; give it a value, or leave it out"
    refused([*words, f"--config={tmp_path / 'empty.yaml'}"], message, tmp_path, capsys)


BAD_VIDEOS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no video": (no_video, "bad.mp4 is not a video"),
    "no frames": (no_frames, "expected frames, found none"),
    "a truncated file": (truncated, "re-encod"),
    "a corrupt frame": (corrupt, "frame 5 cannot be decoded"),
}


@pytest.mark.parametrize("case", BAD_VIDEOS)
def test_a_bad_video_says_what_to_do_and_leaves_nothing(
    case: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, message = BAD_VIDEOS[case]
    spoil(tmp_path / "bad.mkv" if case == "no frames" else tmp_path / "bad.mp4")
    (bad,) = tmp_path.glob("bad.*")
    refused([*words, f"--data.video={bad}"], message, tmp_path, capsys)


def pickled(model: Path) -> None:
    (weights,) = (model / "unet").glob("*.safetensors")
    weights.rename(weights.with_suffix(".bin"))


def no_vae(model: Path) -> None:
    shutil.rmtree(model / "vae")


def not_a_number(model: Path) -> None:
    (file,) = (model / "unet").glob("*.safetensors")
    weights = load_file(file)
    weights["conv_out.bias"][0] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})


BAD_MODELS: dict[str, tuple[Callable[[Path], None], str]] = {
    "pickled weights": (pickled, "pickled weights"),
    "a missing component": (no_vae, "has no vae/"),
    "NaN": (not_a_number, "NaN or infinite values in inversion at step 0"),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_a_bad_model_says_what_to_do_and_leaves_nothing(
    case: str,
    words: list[str],
    model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil, message = BAD_MODELS[case]
    bad = Path(shutil.copytree(model_folder, tmp_path / "model"))
    spoil(bad)
    refused([*words, f"--model.backbone={bad}"], message, tmp_path, capsys)


def test_an_unknown_command_names_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["edit"])
    err = capsys.readouterr().err
    assert "'edit'" in err
    assert all(name in err for name in COMMANDS)


def test_doctor_finds_this_installation_well(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["doctor"])
    out = capsys.readouterr().out
    assert exit.value.code == 0, out
    for name in ("torch", "diffusers", "accelerator", "libx264", "PnP"):
        assert name in out
    for name in ("accelerate", "opencv-python-headless", "safetensors"):
        assert any(line.split() == [name, version(name)] for line in out.splitlines())


def test_doctor_tells_what_to_do_about_a_torchvision_for_another_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(tmp_path, "torchvision", "", "0.1")
    reason = "operator torchvision::nms does not exist"
    (tmp_path / "torchvision.py").write_text(f"raise RuntimeError({reason!r})\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    assert not doctor.check_package("torchvision", doctor.unimportable)
    out = capsys.readouterr().out
    assert f"0.1 BROKEN: RuntimeError: {reason}" in out
    assert f"torchvision 0.1 was not built for torch {version('torch')}: pip install" in out


@pytest.mark.parametrize("model", ["WEIGHTS", "LCM", "TRANSFORMER"])
def test_doctor_finds_an_embedded_model_missing(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, model, tmp_path)
    assert doctor.run([]) == 1
    broken = [line for line in capsys.readouterr().out.splitlines() if "BROKEN" in line]
    assert len(broken) == 1
    assert f"no weights in {tmp_path}" in broken[0]


@pytest.mark.parametrize("words", [["plugins", "--help"], ["doctor", "--help"], ["doctor", "-h"]])
def test_the_small_commands_have_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(words)
    assert capsys.readouterr().out.startswith(f"usage: tokenflow {words[0]}\n")


def test_doctor_refuses_words_that_it_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["doctor", "now"])
    assert exit.value.code == 2
    assert "tokenflow doctor takes no options, got 'now'" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--version"])
    assert capsys.readouterr().out == f"tokenflow {version('tokenflow')}\n"


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_before_the_work_says_try_again(
    sent: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(sent)
    monkeypatch.setitem(COMMANDS, "predict", lambda words: os.kill(os.getpid(), sent))
    with pytest.raises(SystemExit) as exit:
        main(["predict"])
    assert exit.value.code == 75
    assert signal.getsignal(sent) is before
    assert "stopped on request" in capsys.readouterr().err
