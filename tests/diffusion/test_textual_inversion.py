"""Learned words, beside diffusers' pipeline with the same files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import save_file
from torch import Tensor

from tests.diffusion.making import pipeline_of, write_tiny_xl
from tests.diffusion.making_transformers import parts, write_tiny_flux, write_tiny_sd3
from tests.gaussian_flow import GaussianFlow
from tokenflow.diffusion import Backbone, Embedding, Flux, ModelError
from tokenflow.diffusion.unet import UNetBackbone

PROMPTS = ["a <cat> on sand", "a red ball", "<cat> <cat>"]


@pytest.fixture(scope="module")
def folders(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"sd": model_folder, "xl": write_tiny_xl(tmp_path_factory.mktemp("xl"))}


def load(folder: Path, *embeddings: Embedding) -> UNetBackbone:
    model = Backbone.load(folder, "cpu", "float32", embeddings=embeddings)
    assert isinstance(model, UNetBackbone)
    return model


def vectors(count: int, *widths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(count, width, generator=generator) for width in widths]


def written(file: Path, *tensors: Tensor, name: str = "emb_params") -> Path:
    names = ("clip_l", "clip_g") if len(tensors) == 2 else (name,)
    save_file(dict(zip(names, tensors, strict=True)), file)
    return file


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("family", ["sd", "xl"])
def test_it_is_diffusers_pipeline(
    folders: dict[str, Path], tmp_path: Path, family: str, count: int
) -> None:
    own = vectors(count, *((16,) if family == "sd" else (16, 24)))
    file = written(tmp_path / "cat.safetensors", *own)
    model, plain = load(folders[family], Embedding(str(file), "<cat>")), load(folders[family])
    fingerprint, before = plain.fingerprint, plain.embed(PROMPTS)["embeddings"]
    pipeline = pipeline_of(plain)
    for text, one in zip(plain.texts, own, strict=True):
        pipeline.load_textual_inversion(
            {"<cat>": one}, token="<cat>", tokenizer=text.tokenizer, text_encoder=text.encoder
        )
    expected = pipeline.encode_prompt(PROMPTS, "cpu", 1, False)[0] if family == "sd" else (
        pipeline.encode_prompt(PROMPTS, device="cpu")[0]
    )  # fmt: skip
    found = model.embed(PROMPTS)
    assert torch.equal(found["embeddings"], expected)
    if family == "xl":
        assert torch.equal(found["pooled"], pipeline.encode_prompt(PROMPTS, device="cpu")[2])
    assert (found["embeddings"] - before)[0].abs().max() > 0.01
    assert torch.equal(found["embeddings"][1], before[1])
    assert model.fingerprint != fingerprint
    assert not any(p.requires_grad for text in model.texts for p in text.encoder.parameters())


def test_fluxs_clip_learns_the_word_as_in_diffusers_pipeline(tmp_path: Path) -> None:
    folder, (one,) = write_tiny_flux(tmp_path / "flux"), vectors(2, 12)
    file = written(tmp_path / "cat.safetensors", one)
    plain, model = (
        Backbone.load(folder, "cpu", "float32", embeddings=given)
        for given in ((), (Embedding(str(file), "<cat>"),))
    )
    assert isinstance(plain, Flux)
    fingerprint, before = plain.fingerprint, plain.embed(PROMPTS)["pooled"]
    pipeline = FluxPipeline(**parts(plain))
    pipeline.load_textual_inversion({"<cat>": one}, token="<cat>")
    expected, pooled, _ = pipeline.encode_prompt(PROMPTS, None, device="cpu")
    found = model.embed(PROMPTS)
    assert torch.equal(found["pooled"], pooled)
    assert torch.equal(found["embeddings"], expected)
    assert (found["pooled"] - before)[0].abs().max() > 0.01
    assert model.fingerprint != fingerprint


def test_a_family_whose_pipeline_takes_none(tmp_path: Path) -> None:
    model = write_tiny_sd3(tmp_path)
    with pytest.raises(ModelError, match="a StableDiffusion3 takes no embeddings; leave"):
        Backbone.load(model, "cpu", "float32", embeddings=[Embedding("somewhere")])


def test_words_come_from_the_file_or_its_name(folders: dict[str, Path], tmp_path: Path) -> None:
    (one,) = vectors(1, 16)
    named = written(tmp_path / "a.safetensors", one[0], name="<dog>")
    (tmp_path / "folder").mkdir()
    written(tmp_path / "folder" / "<owl>.safetensors", one)
    model = load(folders["sd"], Embedding(str(named)), Embedding(str(tmp_path / "folder")))
    dog, owl, word = model.embed(["<dog>", "<owl>", "a"])["embeddings"]
    assert torch.equal(dog, owl)
    assert not torch.equal(dog, word)


def test_words_are_found_in_capitals_and_beside_longer_ones(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    file = str(written(tmp_path / "a.safetensors", *vectors(2, 16)))
    model = load(folders["sd"], *(Embedding(file, token) for token in ("sks", "MyCat", "sksb")))
    (text,) = model.texts
    assert text.spelled("a SKS, mycat") == "a sks sks_1, MyCat MyCat_1"
    assert text.spelled("sksb sks") == "sksb sksb_1 sks sks_1"
    assert text.tokenizer.tokenize(text.spelled("MyCat"))[-1].lower() == "mycat_1"
    assert text.spelled("a red ball") == "a red ball"


def test_a_model_that_has_changed_has_another_fingerprint(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    model = load(folders["xl"])
    before = model.fingerprint
    file = written(tmp_path / "a.safetensors", *vectors(1, 16, 24))
    model.add_embeddings([Embedding(str(file), "sks")])
    assert model.fingerprint != before


def test_the_pooled_token_is_the_last_whatever_the_configuration(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """Published configurations give 2 as the number of the last token, which it is not."""
    own = Embedding(str(written(tmp_path / "cat.safetensors", *vectors(1, 16, 24))), "<cat>")
    model, old = load(folders["xl"], own), load(folders["xl"])
    old.texts[1].encoder.text_model.eos_token_id = 2
    for text, one in zip(old.texts, vectors(1, 16, 24), strict=True):
        text.add("<cat>", one)
    assert old.embed(PROMPTS).same_as(model.embed(PROMPTS))


@pytest.mark.parametrize(
    ("family", "tensors", "token", "message"),
    [
        (
            "sd",
            (24,),
            "<cat>",
            r"expected vectors of width \[16\] .* got \[24\]; .* Stable Diffusion",
        ),
        ("sd", (16, 24), "<cat>", r"expected vectors of width \[16\] .* got \[16, 24\]"),
        ("xl", (16,), "<cat>", r"expected vectors of width \[16, 24\] .* got \[16\]; .* SDXL"),
        ("sd", (16,), "a</w>", r"the word 'a</w>' is in the text encoder's vocabulary already"),
    ],
)
def test_what_does_not_fit(
    folders: dict[str, Path], tmp_path: Path, family: str, tensors: Any, token: str, message: str
) -> None:
    file = written(tmp_path / "cat.safetensors", *vectors(1, *tensors))
    with pytest.raises(ModelError, match=message):
        load(folders[family], Embedding(str(file), token))


def test_files_of_another_layout(folders: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, file)
    with pytest.raises(ModelError, match=r"another layout: expected the vectors of .* found a, b;"):
        load(folders["sd"], Embedding(str(file)))
    (tmp_path / "a.pt").touch()
    with pytest.raises(ModelError, match="may hold a pickle"):
        load(folders["sd"], Embedding(str(tmp_path / "a.pt")))


def test_a_family_that_takes_none() -> None:
    with pytest.raises(ModelError, match="a GaussianFlow takes no embeddings; leave embeddings"):
        GaussianFlow().add_embeddings([Embedding("somewhere")])
