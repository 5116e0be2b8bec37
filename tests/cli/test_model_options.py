"""What is put into a model from the command line, and what a run's record says of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import AutoencoderKL
from safetensors.torch import save_file

from tokenflow.cli.main import main
from tokenflow.testing import tiny_clip
from tokenflow.video import read_clip, write_clip


def edited(folder: Path, model: Path, *options: str) -> Path:
    """The folder of an edit by a few words."""
    video = folder / "in.mp4"
    if not video.exists():
        write_clip(video, tiny_clip(3))
    main([
        "predict", f"--data.video={video}", f"--model.backbone={model}", "--model.prompt=a ball",
        "--model.inversion_prompt=a box", "--model.steps=1", "--output.overwrite=true",
        f"--output.folder={folder / 'runs'}", "--trainer.accelerator=cpu", *options,
    ])  # fmt: skip
    return folder / "runs" / "in"


def lora(file: Path, scale: float) -> Path:
    torch.manual_seed(0)
    stem = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_v"
    down, up = torch.randn(2, 16), scale * torch.randn(16, 2)
    save_file({f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}, file)
    return file


def test_a_vae_loras_and_embeddings_change_the_edit_and_are_recorded(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plain = read_clip(edited(tmp_path, model_folder) / "edited.mp4").frames
    with torch.random.fork_rng():
        torch.manual_seed(4)
        config = AutoencoderKL.load_config(model_folder / "vae")
        AutoencoderKL.from_config(config).save_pretrained(tmp_path / "vae")
    lora(tmp_path / "a.safetensors", 0.5)
    given = "[{model: a.safetensors, scale: 0.8}, {model: a.safetensors}]"
    save_file({"<ball>": torch.ones(16)}, tmp_path / "word.safetensors")
    run = edited(
        tmp_path, model_folder, "--model.vae=vae", f"--model.loras={given}",
        "--model.embeddings=[{model: word.safetensors}]", "--model.prompt=a <ball>",
    )  # fmt: skip
    assert (read_clip(run / "edited.mp4").frames - plain).abs().max() > 0.05
    (record,) = run.glob("*.yaml")
    model = yaml.safe_load(record.read_text())["model"]
    assert model["vae"] == str(tmp_path / "vae")
    file = str(tmp_path / "a.safetensors")
    word = {"model": str(tmp_path / "word.safetensors"), "token": None}
    assert model["embeddings"] == [word]
    assert model["loras"] == [{"model": file, "scale": 0.8}, {"model": file, "scale": 1.0}]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.vae=./gone"], "gone' does not exist"),
        (["--model.loras=[{model: ./gone.safetensors}]"], "gone.safetensors' does not exist"),
        (["--model.loras=[{model: a, scale: .nan}]"], "scale is a finite number"),
        (["--model.loras=[{model: a, weight: 2}]"], "weight"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(
    options: list[str], message: str, model_folder: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        edited(tmp_path, model_folder, *options)
    assert ended.value.code != os.EX_OK
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_learned_word_changes_the_edit(model_folder: Path, tmp_path: Path) -> None:
    word = "--model.prompt=a <ball>"
    plain = read_clip(edited(tmp_path, model_folder, word) / "edited.mp4").frames
    save_file({"<ball>": torch.ones(16)}, tmp_path / "word.safetensors")
    given = f"--model.embeddings=[{{model: {tmp_path / 'word.safetensors'}}}]"
    other = read_clip(edited(tmp_path, model_folder, word, given) / "edited.mp4").frames
    assert (other - plain).abs().max() > 0.01
