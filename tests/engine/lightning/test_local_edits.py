"""`--model.mask` and `--model.depth`, from the command line to the written video."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tests.diffusion.making import with_channels
from tokenflow.cli.main import main
from tokenflow.engine.lightning.job import ClipSource
from tokenflow.engine.lightning.mask import cut_mask
from tokenflow.errors import InputError
from tokenflow.video import Clip, read_clip, write_clip, write_image

FRAMES = 3


@pytest.fixture
def video(tmp_path: Path) -> Path:
    frames = torch.rand(FRAMES, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    return write_clip(tmp_path / "in.mp4", Clip.from_frames(frames))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    white = torch.zeros(3, 32, 48)
    white[:, 8:20, 10:30] = 1
    return write_image(tmp_path / "mask.png", white)


def test_one_image_is_the_mask_of_all_frames_and_of_the_metrics(
    video: Path, image: Path, tmp_path: Path, model_folder: Path
) -> None:
    main([
        "predict", f"--data.video={video}", f"--model.backbone={model_folder}",
        "--model.prompt=a ball", "--model.steps=1", f"--output.folder={tmp_path / 'runs'}",
        "--trainer.accelerator=cpu", f"--model.mask={image}", "--model.mask_edge=1",
        "--metrics.measure=true", "--metrics.distances=1",
    ])  # fmt: skip
    folder = tmp_path / "runs" / "in"
    change = (read_clip(folder / "edited.mp4").frames - read_clip(video).frames).abs().mean(dim=1)
    inside = torch.zeros(FRAMES, 32, 48, dtype=torch.bool)
    inside[:, 8:20, 10:30] = True
    # what the video's compression leaves, and smears over the border
    assert change[inside].mean() > 3 * change[~inside].mean()
    metrics = json.loads((folder / "metrics.json").read_text())["metrics"]
    assert metrics["psnr_outside"] > metrics["psnr"]
    record = yaml.safe_load((folder / "run.yaml").read_text())
    assert record["model"]["mask"] == record["run"]["mask"] == str(image)
    assert record["run"]["inputs"]["model.mask"]["path"] == str(image)


def test_a_mask_is_cut_as_the_source(tmp_path: Path) -> None:
    frames = torch.zeros(6, 3, 64, 96)
    for number in range(6):
        frames[number, :, :, : 16 * number] = 1
        write_image(tmp_path / "mask" / f"{number}.png", frames[number])
    (tmp_path / "mask" / "6.png").touch()  # beyond what the edit needs nothing is decoded
    write_clip(tmp_path / "in.mp4", Clip.from_frames(frames))
    source = ClipSource(tmp_path / "in.mp4", start=1, stop=6, stride=2, resolution=32)
    like = source.read(16)
    whole = cut_mask(tmp_path / "mask", source, 16, like)
    assert [int(frame.mean(dim=0)[0].sum()) for frame in whole.frames] == [8, 24, 40]
    one = cut_mask(tmp_path / "mask" / "3.png", source, 16, like)
    assert len(one) == 3
    assert [int(frame.mean(dim=0)[0].sum()) for frame in one.frames] == [24] * 3


def test_masks_that_do_not_fit(video: Path, image: Path, tmp_path: Path) -> None:
    source = ClipSource(video)
    like = source.read(16)
    for number in range(2):
        write_image(tmp_path / "short" / f"{number}.png", torch.ones(3, 32, 48))
    with pytest.raises(InputError, match=r"expected a mask of 3 frames of 48x32 .* 2 frames of"):
        cut_mask(tmp_path / "short", source, 16, like)
    write_image(tmp_path / "other.png", torch.ones(3, 32, 32))
    with pytest.raises(InputError, match=r"expected a mask of 3 frames of 48x32 .* 1 frames of 32"):
        cut_mask(tmp_path / "other.png", source, 16, like)
    alpha = np.full((32, 48, 4), 128, np.uint8)
    Image.fromarray(alpha).save(tmp_path / "alpha.png")
    with pytest.raises(InputError, match=r"alpha\.png has an alpha channel .* flatten it"):
        cut_mask(tmp_path / "alpha.png", source, 16, like)


def test_one_mask_for_many_clips_is_refused_before_the_model_is_loaded(
    tmp_path: Path, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "clips.csv").write_text("video\nin.mp4\n")
    with pytest.raises(SystemExit):
        main([
            "predict", f"--data.manifest={tmp_path / 'clips.csv'}", "--model.prompt=a ball",
            "--model.backbone=./gone", "--trainer.accelerator=cpu", f"--model.mask={image}",
        ])  # fmt: skip
    assert "expected no --model.mask with --data.manifest" in capsys.readouterr().err


@pytest.fixture
def depth(tmp_path: Path) -> Path:
    """One image of 16 bits whose levels lie within one of 8 bits."""
    grey = np.linspace(1000, 1200, 32 * 48).astype(np.uint16).reshape(32, 48)
    Image.fromarray(grey).save(tmp_path / "depth.png")
    return tmp_path / "depth.png"


def test_depth_is_cut_as_the_source_and_keeps_its_levels(video: Path, depth: Path) -> None:
    source = ClipSource(video, start=1)
    found = cut_mask(depth, source, 16, source.read(16), "depth")
    assert len(found) == FRAMES - 1
    assert len(found.frames[1].unique()) > 100


def test_depth_goes_from_the_command_to_the_model_and_the_record(
    video: Path, depth: Path, tmp_path: Path
) -> None:
    model = with_channels(tmp_path / "model", 5)
    main([
        "predict", f"--data.video={video}", f"--model.backbone={model}", "--model.prompt=a ball",
        "--model.steps=1", f"--output.folder={tmp_path / 'runs'}", "--trainer.accelerator=cpu",
        f"--model.depth={depth}",
    ])  # fmt: skip
    record = yaml.safe_load((tmp_path / "runs" / "in" / "run.yaml").read_text())
    assert record["model"]["depth"] == record["run"]["inputs"]["model.depth"]["path"] == str(depth)


@pytest.mark.parametrize(("pixels", "levels"), [("gray16le", 2048), ("yuv420p10le", 50)])
def test_a_video_of_depth_keeps_its_levels(tmp_path: Path, pixels: str, levels: int) -> None:
    """A ramp of 2048 levels within 16 of 8 bits, as FFmpeg writes it in 16 and in 10."""
    ramp = np.linspace(20_000, 24_000, 64 * 32).astype(np.uint16).reshape(32, 64)
    path = tmp_path / "depth.mkv"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("ffv1", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 32, pixels
        frame = av.VideoFrame.from_ndarray(ramp, "gray16le")
        for packet in (*stream.encode(frame), *stream.encode()):
            output.mux(packet)
    found, plain = (read_clip(path, deep=deep).frames[0, 0] for deep in (True, False))
    assert len(plain.unique()) <= 17
    assert len(found.unique()) >= levels
    # swscale's white in 16 bits is 65280, and 10 bits of video range are steps of 0.0011
    assert (found - torch.from_numpy(ramp / 65535).float()).abs().max() < 0.002


def test_a_row_of_a_manifest_has_its_own_mask_and_depth(
    video: Path, image: Path, depth: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = with_channels(tmp_path / "model", 5)
    rows = (
        f"- {{video: {video.name}, depth: {depth.name}, edit_mask: {image.name}, mask_edge: 1}}\n"
    )
    rows += f"- {{video: {video.name}, name: without}}\n"
    rows += f"- {{video: {video.name}, name: auto, depth: {depth.name}, edit_mask: auto}}\n"
    (tmp_path / "clips.yaml").write_text(rows)
    with pytest.raises(SystemExit):
        main([
            "predict", f"--data.manifest={tmp_path / 'clips.yaml'}", "--model.prompt=a ball",
            f"--model.backbone={model}", "--model.steps=1", "--trainer.accelerator=cpu",
            f"--output.folder={tmp_path / 'runs'}", "--model.inversion_prompt=a box",
            "--metrics.measure=true", "--metrics.distances=1",
        ])  # fmt: skip
    out = " ".join(capsys.readouterr().out.split())
    assert "2 done, 0 skipped, 1 failed" in out
    assert "expected the depth of the clip for this model" in out
    run = yaml.safe_load((tmp_path / "runs" / "in" / "run.yaml").read_text())["run"]
    assert run["model"] == {"mask": str(image), "depth": str(depth)}
    assert {option: one["path"] for option, one in run["inputs"].items()} == {
        "data.video": str(video), "model.mask": str(image), "model.depth": str(depth),
    }  # fmt: skip
    frames = read_clip(tmp_path / "runs" / "in" / "edited.mp4").frames - read_clip(video).frames
    assert frames[..., 8:20, 10:30].abs().mean() > 3 * frames[..., 24:, :].abs().mean()
    # an automatic one is in the run's folder, exactly as it was, and is what it is measured by
    folder = tmp_path / "runs" / "auto"
    found = read_clip(folder / "mask.mp4").frames
    assert found.shape == (FRAMES, 3, 32, 48)
    assert torch.equal(found, (found > 0.5).float())
    assert 0 < found.mean() < 1
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["options"]["mask"] == "auto"
    assert metrics["metrics"]["psnr_outside"] > metrics["metrics"]["psnr"]
    run = yaml.safe_load((folder / "run.yaml").read_text())["run"]
    assert run["model"]["mask"] == "auto"
    assert "model.mask" not in run["inputs"]


@pytest.mark.parametrize(
    ("channels", "option", "message"),
    [
        (5, [], "give a video, folder of images or image by --model.depth"),
        (9, [], "give a video, folder of images or image by --model.mask"),
        (4, ["--model.depth={depth}"], "expected no depth for this model"),
        (4, ["--model.mask=auto"], "expected two prompts, that of the source is empty"),
        (
            9,
            ["--model.mask=auto", "--model.inversion_prompt=a box"],
            "expected a mask of a file for this model",
        ),
    ],
)
def test_what_the_model_needs_is_asked_for_before_any_work(
    video: Path, depth: Path, tmp_path: Path, channels: int, option: list[str], message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    model = with_channels(tmp_path / "model", channels)
    with pytest.raises(SystemExit):
        main([
            "predict", f"--data.video={video}", f"--model.backbone={model}",
            "--model.prompt=a ball", f"--output.folder={tmp_path / 'runs'}",
            "--trainer.accelerator=cpu", *(text.format(depth=depth) for text in option),
        ])  # fmt: skip
    assert message in " ".join(capsys.readouterr().err.split())


def test_depth_with_an_alpha_channel(video: Path, tmp_path: Path) -> None:
    source = ClipSource(video)
    Image.fromarray(np.full((32, 48, 4), 128, np.uint8)).save(tmp_path / "alpha.png")
    with pytest.raises(InputError, match=r"the depth .*alpha\.png has an alpha channel"):
        cut_mask(tmp_path / "alpha.png", source, 16, source.read(16), "depth")
