import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

from tests.conftest import ROOT
from tests.diffusion.making import make_controlnet
from tokenflow.cli.main import main
from tokenflow.diffusion import Backbone, Conditioning, ModelError, StableDiffusion
from tokenflow.editors import (
    Batch,
    Canny,
    Condition,
    Control,
    ControlNet,
    Prompts,
    SDEdit,
)
from tokenflow.editors.controlnet import require_controls
from tokenflow.engine import Result, Settings, edit_clip
from tokenflow.errors import InputError
from tokenflow.propagation import NNField
from tokenflow.video import Clip, write_clip, write_image

NAMES = ("source", "negative", "prompt")

# float32 sums in another order, in batches of another size
ROUNDING = 1e-5


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory, backbone: StableDiffusion) -> list[str]:
    """Two tiny ControlNets."""
    folder = tmp_path_factory.mktemp("controlnets")
    return [str(make_controlnet(folder / str(i), backbone.unet, seed=i)) for i in range(2)]


class Inverted(Condition):
    """The negative of every frame: control images that differ from frame to frame."""

    def of(self, clip: Clip) -> Tensor:
        return 1 - clip.frames


def ready(backbone: Backbone, clip: Clip, *controls: Control, **options: Any) -> ControlNet:
    """An editor with these controls, prepared."""
    first, *further = controls
    editor = ControlNet(**vars(first), further=further, **options)
    editor.prepare(backbone, clip)
    return editor


def one_pass(
    frames: tuple[int, ...] = (4, 1, 6),
    branches: tuple[str, ...] = NAMES,
    step: int = 0,
    steps: int = 4,
) -> Batch:
    """A pass of random latents under random embeddings, another one for each branch and frame."""
    generator = torch.Generator().manual_seed(len(frames))
    rows = len(branches) * len(frames)
    latents = torch.randn(len(branches), len(frames), 4, 8, 16, generator=generator)
    embeddings = torch.randn(rows, 5, 16, generator=generator)
    told = Conditioning(embeddings=embeddings)
    return Batch(branches, frames, latents, told, 334, step, steps)


def text_of(batch: Batch) -> Tensor:
    """The embeddings of every branch and frame."""
    shape = len(batch.branches), len(batch.frames)
    return batch.conditioning["embeddings"].unflatten(0, shape)


def flat(extra: dict[str, Any]) -> list[Tensor]:
    """All residuals, the middle's last."""
    return [*extra["down_block_additional_residuals"], extra["mid_block_additional_residual"]]


def naive(editor: ControlNet, number: int, batch: Batch, controlled: set[str]) -> list[Tensor]:
    """Residuals of one control, one batch pass for each branch and frame."""
    control, network, images, _ = editor.shown[number]
    parts = []
    for branch, name in enumerate(batch.branches):
        for place, frame in enumerate(batch.frames):
            with torch.no_grad():
                down, middle = network.network(
                    batch.latents[branch, place][None],
                    torch.tensor(batch.t),
                    encoder_hidden_states=text_of(batch)[branch, place][None],
                    controlnet_cond=images[frame][None],
                    return_dict=False,
                )
            scale = control.scale if name in controlled else 0.0
            parts.append([scale * part for part in (*down, middle)])
    return [torch.cat(same) for same in zip(*parts, strict=True)]


def assert_equal(extra: dict[str, Any], expected: list[Tensor]) -> None:
    found = flat(extra)
    assert [part.shape for part in found] == [part.shape for part in expected]
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=ROUNDING, atol=ROUNDING * float(other.abs().max()))


@pytest.mark.parametrize("frames", [(4, 1, 6), (0, 1, 2, 3, 4), (8,)])
def test_residuals_are_the_networks_and_zero_for_the_source(
    backbone: Backbone, clip: Clip, models: list[str], frames: tuple[int, ...]
) -> None:
    editor = ready(backbone, clip, Control(models[0], Inverted(), 0.7))
    batch = one_pass(frames)
    extra = editor.model_inputs(batch)
    assert_equal(extra, naive(editor, 0, batch, {"negative", "prompt"}))
    for part in flat(extra):
        source, *edited = part.chunk(3)
        assert source.abs().max() == 0
        assert all(branch.abs().max() > 0 for branch in edited)
    assert set(extra) == {"down_block_additional_residuals", "mid_block_additional_residual"}


def test_the_source_is_controlled_where_asked_for(
    backbone: Backbone, clip: Clip, models: list[str]
) -> None:
    editor = ready(backbone, clip, Control(models[0], Inverted()), control_source=True)
    for branches in (NAMES, ("source",)):
        batch = one_pass(branches=branches)
        assert_equal(editor.model_inputs(batch), naive(editor, 0, batch, set(branches)))


def test_inversion_is_not_controlled_unasked(
    backbone: Backbone, clip: Clip, models: list[str]
) -> None:
    editor = ready(backbone, clip, Control(models[0]))
    assert editor.model_inputs(one_pass(branches=("source",))) == {}


def test_a_network_that_pools_its_image_speaks_for_the_prompt_alone(
    backbone: Backbone, clip: Clip, models: list[str]
) -> None:
    editor = ready(backbone, clip, Control(models[0], Inverted()), Control(models[1], Inverted()))
    editor.shown[0].network.network.register_to_config(global_pool_conditions=True)
    batch = one_pass()
    each = [
        naive(editor, 0, batch, {"prompt"}),
        naive(editor, 1, batch, {"negative", "prompt"}),
    ]
    assert_equal(editor.model_inputs(batch), [sum(s) for s in zip(*each, strict=True)])  # type: ignore[misc]
    editor.shown[1].network.network.register_to_config(global_pool_conditions=True)
    assert editor.model_inputs(one_pass(branches=("source", "negative"))) == {}


def test_several_controls_add_up(backbone: Backbone, clip: Clip, models: list[str]) -> None:
    controls = Control(models[0], Inverted(), 0.5), Control(models[1], Canny(), 2.0)
    editor = ready(backbone, clip, *controls, Control(models[0], Canny(10.0, 20.0)))
    batch = one_pass()
    each = [naive(editor, i, batch, {"negative", "prompt"}) for i in range(3)]
    assert_equal(editor.model_inputs(batch), [sum(s) for s in zip(*each, strict=True)])  # type: ignore[misc]
    assert editor.shown[0].network is editor.shown[2].network


@pytest.mark.parametrize(
    ("begin", "end", "steps", "expected"),
    [
        *((0.0, 1.0, 4, [0, 1, 2, 3]), (0.0, 0.5, 4, [0, 1]), (0.5, 1.0, 4, [2, 3])),
        *((0.3, 0.7, 10, [3, 4, 5, 6]), (0.1, 0.11, 10, [1]), (0.0, 0.01, 10, [0])),
        *((0.95, 1.0, 10, []), (0.0, 1.0, 1, [0]), (0.1, 1.0, 1, [])),
    ],
)
def test_a_control_is_on_from_begin_to_before_end(
    backbone: Backbone,
    clip: Clip,
    models: list[str],
    begin: float,
    end: float,
    steps: int,
    expected: list[int],
) -> None:
    editor = ready(backbone, clip, Control(models[0], begin=begin, end=end))
    batches = [one_pass(step=step, steps=steps) for step in range(steps)]
    assert [batch.step for batch in batches if editor.model_inputs(batch)] == expected


def test_a_control_that_is_off_leaves_the_others_on(
    backbone: Backbone, clip: Clip, models: list[str]
) -> None:
    editor = ready(
        backbone, clip, Control(models[0], Inverted(), end=0.5), Control(models[1], begin=0.25)
    )
    batch = one_pass(step=3)
    expected = naive(editor, 1, batch, {"negative", "prompt"})
    assert_equal(editor.model_inputs(batch), expected)


class Recording(ControlNet):
    """Keeps every pass, and what the network was shown in it."""

    def prepare(self, model: Backbone, clip: Clip) -> None:
        super().prepare(model, clip)
        self.passes: list[Batch] = []
        self.seen: list[dict[str, Tensor]] = []

        def keep(module: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
            text, images = options["encoder_hidden_states"], options["controlnet_cond"]
            self.seen.append({"latents": args[0], "embeddings": text, "images": images})

        self.shown[0].network.network.register_forward_pre_hook(keep, with_kwargs=True)

    def model_inputs(self, batch: Batch) -> dict[str, Any]:
        self.passes.append(batch)
        return super().model_inputs(batch)


def edit(backbone: Backbone, clip: Clip, editor: SDEdit, **settings: Any) -> Result:
    """Two steps with windows of four frames."""
    chosen = Settings(**{"steps": 2, "keyframe_every": 4, "batch": 4, **settings})
    prompts = Prompts("a blue ball", "", "a ball")
    return edit_clip(backbone, clip, prompts, editor, NNField(), chosen)


@pytest.mark.parametrize("control_source", [False, True])
def test_the_network_sees_exactly_the_frames_of_each_pass(
    backbone: Backbone, clip: Clip, models: list[str], control_source: bool
) -> None:
    editor = Recording(models[0], Inverted(), control_source=control_source)
    edit(backbone, clip, editor)
    inversion = [p for p in editor.passes if p.branches == ("source",)]
    sampling = [p for p in editor.passes if p.branches == NAMES]
    batches = [(0, 1, 2, 3), (4, 5, 6, 7), (8,)]
    assert [p.frames for p in inversion] == [part for part in batches for _ in range(2)]
    assert [len(p.frames) for p in sampling] == 2 * [3, 4, 2]
    assert [p.keyframes for p in sampling] == 2 * [True, False, False]
    for one_step in (sampling[:3], sampling[3:]):
        assert sorted(frame for p in one_step for frame in p.frames) == list(range(9))
    controlled = editor.passes if control_source else sampling
    branches = slice(None) if control_source else slice(1, None)
    assert len(editor.seen) == len(controlled)
    for seen, batch in zip(editor.seen, controlled, strict=True):
        latents, embeddings = batch.latents[branches], text_of(batch)[branches]
        images = (1 - clip.frames)[list(batch.frames)]
        assert torch.equal(seen["images"], torch.cat([images] * len(latents)))
        assert torch.equal(seen["latents"], latents.flatten(0, 1))
        assert torch.equal(seen["embeddings"], embeddings.flatten(0, 1))


def test_the_source_branch_sees_nothing_of_the_control(
    backbone: Backbone, clip: Clip, models: list[str]
) -> None:
    editor = ready(backbone, clip, Control(models[0], Inverted()))
    batch = one_pass()
    x, told = batch.latents.flatten(0, 1), batch.conditioning
    with torch.no_grad():
        extra = editor.model_inputs(batch)
        plain = backbone.predict(x, batch.t, told).chunk(3)
        controlled = backbone.predict(x, batch.t, told, **extra).chunk(3)
    assert torch.equal(plain[0], controlled[0])
    for branch in (1, 2):
        assert (plain[branch] - controlled[branch]).abs().max() > 0.01


@pytest.mark.parametrize("consistency", ["tokenflow", "joint", "none"])
def test_an_edit_is_controlled_and_starts_as_sdedit_does(
    backbone: Backbone, clip: Clip, models: list[str], consistency: str
) -> None:
    def edited(editor: SDEdit) -> Tensor:
        return edit(backbone, clip, editor, consistency=consistency).clip.frames

    plain = edited(SDEdit(0.5, "independent"))
    controlled = edited(ControlNet(models[0], strength=0.5, noise="independent"))
    assert (plain - controlled).abs().mean() > 1e-3
    # residuals of zero are added to numbers
    unscaled = edited(ControlNet(models[0], scale=0.0, strength=0.5, noise="independent"))
    assert torch.allclose(plain, unscaled, rtol=0, atol=1e-6)


def test_the_unet_is_as_before(backbone: Backbone, clip: Clip, models: list[str]) -> None:
    x, text = torch.randn(2, 4, 8, 16), backbone.embed(["", "a ball"])
    with torch.no_grad():
        before = backbone.predict(x, 1, text)
        edit(backbone, clip, ControlNet(models[0], control_source=True))
        assert torch.equal(backbone.predict(x, 1, text), before)
    assert not any(module._forward_hooks for module in backbone.network.modules())


def test_networks_are_loaded_once_and_images_for_every_clip(
    backbone: Backbone, clip: Clip, models: list[str], model_folder: Path
) -> None:
    editor = ready(backbone, clip, Control(models[0], Inverted()))
    network = editor.shown[0].network
    other = Clip.from_frames(clip.frames[:2].flip(-1))
    editor.prepare(backbone, other)
    assert editor.shown[0].network is network
    assert torch.equal(editor.shown[0].images, 1 - other.frames)
    half = Backbone.load(model_folder, device="cpu", dtype="bfloat16")
    editor.prepare(half, clip)
    assert editor.shown[0].network.network.dtype == torch.bfloat16
    assert {part.dtype for part in flat(editor.model_inputs(bfloat(one_pass())))} == {
        torch.bfloat16
    }


def bfloat(batch: Batch) -> Batch:
    """The pass as a backbone in bfloat16 makes it: latents stay in float32."""
    return dataclasses.replace(batch, conditioning=batch.conditioning.map(Tensor.bfloat16))


def test_canny_is_what_a_control_shows_unless_told_otherwise(
    backbone: Backbone, clip: Clip, models: list[str]
) -> None:
    editor = ready(backbone, clip, Control(models[0]))
    assert torch.equal(editor.shown[0].images, Canny().of(clip))


def test_a_controlnet_of_another_backbone_is_refused_before_any_work(
    backbone: StableDiffusion, clip: Clip, tmp_path: Path
) -> None:
    other = make_controlnet(tmp_path / "other", backbone.unet, cross_attention_dim=24)
    done: list[str] = []
    with pytest.raises(ModelError, match=r"expected cross-attention width 16 \(found 24\)"):
        edit_clip(
            backbone,
            clip,
            "a blue ball",
            ControlNet(str(other)),
            NNField(),
            on_step=lambda stage, *_: done.append(stage),
        )
    assert done == []


def test_further_controls_are_controls() -> None:
    with pytest.raises(InputError, match=r"list of tokenflow.editors.Control, got one dict"):
        require_controls([Control(), {"model": "miniature"}])


def test_an_editor_that_was_not_prepared() -> None:
    with pytest.raises(InputError, match="needs prepare"):
        ControlNet().model_inputs(one_pass())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": -1.0}, r"scale is a number from 0 up, got -1\.0"),
        ({"scale": float("nan")}, "scale is a number from 0 up, got nan"),
        ({"scale": float("inf")}, "scale is a number from 0 up, got inf"),
        ({"begin": -0.1}, r"0 <= begin < end <= 1; got begin -0\.1 and end 1\.0"),
        ({"end": 1.5}, r"got begin 0\.0 and end 1\.5"),
        ({"begin": 0.5, "end": 0.5}, r"got begin 0\.5 and end 0\.5"),
        ({"strength": 0.0}, "strength is the share"),
        ({"strength": 1.5}, "strength is the share"),
        ({"noise": "fresh"}, "noise must be one of"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ControlNet(**options)


@pytest.fixture
def words(tmp_path: Path, model_folder: Path, clip: Clip) -> list[str]:
    """A small run that works, of the clip in a file."""
    video = write_clip(tmp_path / "noise.mp4", clip)
    return [
        f"--data.video={video}",
        f"--model.backbone={model_folder}",
        "--model.prompt=a blue ball",
        "--model.steps=2",
        "--model.inversion_steps=2",
        "--data.resolution=16",
        f"--output.folder={tmp_path / 'runs'}",
        "--trainer.accelerator=cpu",
    ]


def editor_of(tmp_path: Path) -> dict[str, Any]:
    """What a run's record says of its editor."""
    summary = yaml.safe_load((tmp_path / "runs" / "noise" / "run.yaml").read_text())
    return dict(summary["model"]["editor"])


def test_one_control_from_the_command_line(
    words: list[str], tmp_path: Path, models: list[str], clip: Clip
) -> None:
    for i, frame in enumerate(clip.frames):
        write_image(tmp_path / "control" / f"{i}.png", frame)
    chosen = [
        "--model.editor=ControlNet",
        f"--model.editor.model={models[0]}",
        "--model.editor.condition=ControlVideo",
        f"--model.editor.condition.path={tmp_path / 'control'}",
        "--model.editor.scale=0.5",
        "--model.editor.strength=0.5",
    ]
    main(["predict", *words, *chosen])
    options = editor_of(tmp_path)["init_args"]
    assert options["model"] == models[0]
    assert options["condition"]["class_path"].endswith("ControlVideo")
    assert options["strength"] == 0.5


def short(folder: Path, clip: Clip) -> None:
    for i, frame in enumerate(clip.frames[:-1]):
        write_image(folder / f"{i}.png", frame)


def narrow(folder: Path, clip: Clip) -> None:
    for i, frame in enumerate(clip.frames):
        write_image(folder / f"{i}.png", frame[..., :16])


def transparent(folder: Path, clip: Clip) -> None:
    folder.mkdir()
    for i in range(len(clip)):
        Image.new("RGBA", (32, 16), (255, 255, 255, 128)).save(folder / f"{i}.png")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (short, "must have one frame for each of the clip's 9, found only 8; give it the clip's"),
        (narrow, "is 16x16, expected the aspect of the clip's 32x16; crop or pad it"),
        (transparent, "has an alpha channel (in 0.png), and what lies under it is not defined"),
    ],
)
def test_a_control_video_that_does_not_fit_leaves_nothing(
    make: Callable[[Path, Clip], None],
    message: str,
    words: list[str],
    tmp_path: Path,
    models: list[str],
    clip: Clip,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make(tmp_path / "control", clip)
    chosen = [
        "--model.editor=ControlNet",
        f"--model.editor.model={models[0]}",
        "--model.editor.condition=ControlVideo",
        f"--model.editor.condition.path={tmp_path / 'control'}",
    ]
    with pytest.raises(SystemExit) as exit:
        main(["predict", *words, *chosen])
    assert exit.value.code == 2
    err = capsys.readouterr().err
    assert f"error: the control video {tmp_path / 'control'} {message}" in err
    assert "Traceback" not in err
    assert not (tmp_path / "runs").exists()


def test_several_controls_from_a_file_and_again_from_the_runs_record(
    words: list[str], tmp_path: Path, models: list[str]
) -> None:
    canny = {"class_path": "Canny", "init_args": {"low": 50, "high": 150}}
    further = [{"model": models[1], "condition": canny, "scale": 0.5, "end": 0.5}]
    editor = {"class_path": "ControlNet", "init_args": {"model": models[0], "further": further}}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"model": {"editor": editor}}))
    main(["predict", f"--config={config}", *words])
    first = editor_of(tmp_path)
    assert first["init_args"]["further"][0]["condition"]["init_args"]["low"] == 50
    record = tmp_path / "runs" / "noise" / "run.yaml"
    main(["predict", f"--config={record}", "--output.overwrite=true"])
    assert editor_of(tmp_path) == first


def test_the_configuration_for_controlnet_runs(
    words: list[str], tmp_path: Path, models: list[str]
) -> None:
    config = ROOT / "configs" / "controlnet.yaml"
    main(["predict", f"--config={config}", *words, f"--model.editor.model={models[0]}"])
    written = yaml.safe_load(config.read_text())["model"]["editor"]["init_args"]
    found = editor_of(tmp_path)["init_args"]
    assert {**found, "condition": None} == {**written, "condition": None, "model": models[0]}


def test_help_shows_a_controlnets_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["predict", "--model.editor.help", "ControlNet"])
    text = capsys.readouterr().out
    for option in ("model", "condition", "scale", "further", "control_source", "strength"):
        assert f"--editor.{option}" in text or f"--model.editor.{option}" in text


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (["--model.editor=SDEdit", "--model.editor.strength=0"], "strength is the share"),
        (["--model.editor=SDEdit", "--model.editor.strength=1.5"], "above 0 and up to 1, got 1.5"),
        (["--model.editor=ControlNet", "--model.editor.model=./gone"], "gone' does not exist"),
        (["--model.editor=ControlNet", "--model.editor.end=2"], "0 <= begin < end <= 1"),
    ],
)
def test_bad_options_on_the_command_line(
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    bad: list[str],
    message: str,
) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["predict", *words, *bad])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "runs").rglob("*.*"))


def test_an_editor_says_whether_it_conditions_the_source() -> None:
    assert not ControlNet().conditions_source
    assert ControlNet(control_source=True).conditions_source
    assert ControlNet().sees_other_frames
