"""LoRAs fused into the weights, beside diffusers' pipeline with the same files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.diffusion.making import pipeline_of, sampled, write_tiny_xl
from tests.diffusion.making_transformers import parts, write_tiny_flux, write_tiny_sd3
from tests.diffusion.making_transformers import sampled as sampled_by_transformer
from tests.diffusion.original_layout import original_unet
from tests.gaussian_flow import GaussianFlow
from tokenflow.diffusion import Backbone, Flux, LoRA, ModelError, StableDiffusion3
from tokenflow.diffusion.clip import CLIPText
from tokenflow.diffusion.lora import FILE
from tokenflow.diffusion.unet import UNetBackbone
from tokenflow.errors import InputError

STEPS, PROMPT = 2, "a red ball on sand"
# float32, a layer's two small products in place of one with their sum, through two steps
TOLERANCE = 1e-4

UNET = r"to_[qkv]|to_out\.0|proj_in|ff\.net\.0\.proj|conv1|time_emb_proj"
TEXT = r"[qkv]_proj|out_proj|fc[12]"


@pytest.fixture(scope="module")
def folders(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"sd": model_folder, "xl": write_tiny_xl(tmp_path_factory.mktemp("xl"))}


def load(folder: Path, loras: Sequence[LoRA] = ()) -> UNetBackbone:
    model = Backbone.load(folder, "cpu", "float32", loras=loras)
    assert isinstance(model, UNetBackbone)
    return model


def networks(model: UNetBackbone) -> dict[str, nn.Module]:
    names = "unet", "text_encoder", "text_encoder_2"
    return dict(zip(names, (model.unet, *(text.encoder for text in model.texts)), strict=False))


def factors(network: nn.Module, pattern: str, seed: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """A layer's name, a down and an up matrix; the rank differs from layer to layer."""
    generator = torch.Generator().manual_seed(seed)
    for number, (name, layer) in enumerate(network.named_modules()):
        if not re.search(rf"\.({pattern})$", name) or not isinstance(layer, nn.Linear | nn.Conv2d):
            continue
        rank, weight = 2 + number % 2, layer.weight
        down = torch.randn(rank, *weight.shape[1:], generator=generator)
        shape = (len(weight), rank, *[1] * (weight.ndim - 2))
        # small, as a trained one's: a network far from what it was is a matter of rounding
        yield name, down, 0.05 * torch.randn(*shape, generator=generator)


@cache
def names_in_original(model: UNetBackbone) -> dict[str, str]:
    """Of a UNet's weights in the original code."""
    names = list(model.unet.state_dict())
    numbers = {name: torch.tensor(number) for number, name in enumerate(names)}
    own = original_unet(numbers, model.unet.config.layers_per_block)
    return {names[int(number)]: name for name, number in own.items()}


def kohya(model: UNetBackbone, kind: str, name: str) -> str:
    xl = len(model.texts) > 1
    prefix = {"unet": "lora_unet", "text_encoder": "lora_te1" if xl else "lora_te"}
    if xl and kind == "unet":
        name = names_in_original(model)[f"{name}.weight"].removesuffix(".weight")
    text = "" if kind == "unet" or name.startswith("text_model") else "text_model_"
    return f"{prefix.get(kind, 'lora_te2')}_{text}{name.replace('.', '_')}"


def full(model: UNetBackbone, kind: str, name: str) -> str:
    text = "" if kind == "unet" or name.startswith("text_model") else "text_model."
    return f"{kind}.{text}{name}"


def written(folder: Path, model: UNetBackbone, form: str, seed: int) -> Path:
    """A LoRA for every network in one of the formats that there are."""
    weights: dict[str, Tensor] = {}
    down_name, up_name = {
        "kohya": ("lora_down", "lora_up"), "peft": ("lora_A", "lora_B"),
        "metadata": ("lora_A", "lora_B"), "diffusers": ("lora.down", "lora.up"),
    }[form]  # fmt: skip
    for kind, network in networks(model).items():
        for name, down, up in factors(network, UNET if kind == "unet" else TEXT, seed):
            stem = (kohya if form == "kohya" else full)(model, kind, name)
            if form == "kohya":
                weights[f"{stem}.alpha"] = torch.tensor(1.0)
            linear = "lora_linear_layer." if form == "diffusers" and kind != "unet" else ""
            for side, factor in ((down_name, down), (up_name, up)):
                last = side.replace("lora.", linear) if linear else side
                weights[f"{stem}.{last}.weight"] = factor
    metadata = {}
    if form == "metadata":
        options = {"r": 2, "lora_alpha": 3, "alpha_pattern": {"attn1.to_q": 5}, "use_rslora": True}
        options |= {"rank_pattern": {}, "target_modules": ["to_q"]}
        config = {f"{kind}.{k}": v for kind in networks(model) for k, v in options.items()}
        for kind, network in networks(model).items():
            pattern = UNET if kind == "unet" else TEXT
            found = {name: len(down) for name, down, _ in factors(network, pattern, seed)}
            config[f"{kind}.target_modules"] = list(found)
            config[f"{kind}.rank_pattern"] = {n: r for n, r in found.items() if r != 2}
        metadata["lora_adapter_metadata"] = json.dumps(config)
    file = folder / f"{form}{seed}.safetensors"
    save_file(weights, file, metadata=metadata)
    return file


@pytest.mark.parametrize("form", ["kohya", "peft", "metadata", "diffusers"])
@pytest.mark.parametrize("family", ["sd", "xl"])
def test_several_are_those_of_diffusers_pipeline(
    folders: dict[str, Path], tmp_path: Path, family: str, form: str
) -> None:
    pytest.importorskip("peft")
    plain = load(folders[family])
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    files = [written(tmp_path, plain, form, seed) for seed in (0, 1)]
    names = {name for name, _ in plain.unet.named_modules()}
    loras = [LoRA(str(file), scale) for file, scale in zip(files, (0.7, -0.4), strict=True)]
    model = load(folders[family], loras)
    assert {name for name, _ in model.unet.named_modules()} == names
    found = sampled(model, x, STEPS, PROMPT)
    assert (found - sampled(plain, x, STEPS, PROMPT)).abs().max() > 0.01
    text = model.embed([PROMPT])["embeddings"] - plain.embed([PROMPT])["embeddings"]
    assert text.abs().max() > 0.01
    assert model.fingerprint != plain.fingerprint
    oracle = pipeline_of(plain)  # which changes its networks
    for number, file in enumerate(files):
        oracle.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=f"a{number}")
    oracle.set_adapters(["a0", "a1"], [0.7, -0.4])
    expected = oracle(
        PROMPT, height=16, width=16, num_inference_steps=STEPS, guidance_scale=1.0, latents=x,
        output_type="latent",
    ).images  # fmt: skip
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


TRANSFORMER = (
    r"attn2?\.to_[qkv]|to_out\.0|add_[kqv]_proj|net\.0\.proj|norm1?\.linear|proj_(out|mlp)"
)
Transformer = StableDiffusion3 | Flux


@pytest.fixture(scope="module")
def transformers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        "sd3": write_tiny_sd3(tmp_path_factory.mktemp("sd3")),
        "flux": write_tiny_flux(tmp_path_factory.mktemp("flux")),
    }


def load_transformer(folder: Path, loras: Sequence[LoRA] = ()) -> Transformer:
    model = Backbone.load(folder, "cpu", "float32", loras=loras)
    assert isinstance(model, Transformer)
    return model


def in_peft(model: Transformer, seed: int) -> dict[str, Tensor]:
    """A LoRA for the transformer and CLIP's text encoders."""
    weights: dict[str, Tensor] = {}
    clips = [text.encoder for text in model.texts if isinstance(text, CLIPText)]
    every = zip(
        ("transformer", "text_encoder", "text_encoder_2"), (model.network, *clips), strict=False
    )
    for kind, network in every:
        pattern = TRANSFORMER if kind == "transformer" else TEXT
        for name, down, up in factors(network, pattern, seed):
            text = "" if kind == "transformer" or name.startswith("text_model") else "text_model."
            weights[f"{kind}.{text}{name}.lora_A.weight"] = down
            weights[f"{kind}.{text}{name}.lora_B.weight"] = up
    return weights


def in_kohya(model: Transformer, seed: int) -> dict[str, Tensor]:
    """For Flux, in the names of its own code, where queries, keys and values are one layer.

    Not for its text encoder, for which diffusers' pipeline does not take these names.
    """
    inner = model.transformer.inner_dim
    layers = {
        "unet_double_blocks_0_img_attn_qkv": (inner, 3 * inner),
        "unet_double_blocks_1_txt_attn_qkv": (inner, 3 * inner),
        "unet_double_blocks_1_img_attn_proj": (inner, inner),
        "unet_double_blocks_0_txt_mlp_0": (inner, 4 * inner),
        "unet_double_blocks_0_img_mod_lin": (inner, 6 * inner),
        "unet_single_blocks_1_linear2": (5 * inner, inner),
        "unet_single_blocks_0_modulation_lin": (inner, 3 * inner),
    }
    generator, weights = torch.Generator().manual_seed(seed), dict[str, Tensor]()
    for name, (taken, made) in layers.items():
        weights[f"lora_{name}.lora_down.weight"] = torch.randn(2, taken, generator=generator)
        weights[f"lora_{name}.lora_up.weight"] = 0.05 * torch.randn(made, 2, generator=generator)
        weights[f"lora_{name}.alpha"] = torch.tensor(1.5)
    return weights


@pytest.mark.parametrize(
    ("family", "form"), [("sd3", in_peft), ("flux", in_peft), ("flux", in_kohya)]
)
def test_several_are_those_of_the_transformers_pipelines(
    transformers: dict[str, Path], tmp_path: Path, family: str, form: Callable[..., Any]
) -> None:
    pytest.importorskip("peft")
    plain = load_transformer(transformers[family])
    files = [tmp_path / f"{seed}.safetensors" for seed in (0, 1)]
    for seed, file in enumerate(files):
        save_file(form(plain, seed), file)
    loras = [LoRA(str(file), scale) for file, scale in zip(files, (0.7, -0.4), strict=True)]
    model = load_transformer(transformers[family], loras)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    guidance = 3.5 if family == "flux" else 1.0
    found = sampled_by_transformer(model, x, STEPS, PROMPT, guidance=guidance)
    before = sampled_by_transformer(plain, x, STEPS, PROMPT, guidance=guidance)
    assert (found - before).abs().max() > 0.01
    pooled = model.embed([PROMPT])["pooled"] - plain.embed([PROMPT])["pooled"]
    assert (pooled.abs().max() > 0.001) == (form is in_peft)
    assert model.fingerprint != plain.fingerprint
    kind = FluxPipeline if family == "flux" else StableDiffusion3Pipeline
    oracle = kind(**parts(plain))  # which changes its networks
    oracle.set_progress_bar_config(disable=True)
    for number, file in enumerate(files):
        oracle.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=f"a{number}")
    oracle.set_adapters(["a0", "a1"], [0.7, -0.4])
    packed = FluxPipeline._pack_latents(x, 1, 4, 8, 8) if family == "flux" else x
    expected = oracle(
        PROMPT, height=16, width=16, num_inference_steps=STEPS, guidance_scale=guidance,
        latents=packed, output_type="latent",
    ).images  # fmt: skip
    if family == "flux":
        expected = FluxPipeline._unpack_latents(expected, 16, 16, 2)
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("of", "form", "on"),
    [
        ("sd", "kohya", "flux"),
        ("sd", "kohya", "sd3"),
        ("sd", "peft", "flux"),
        ("sd", "peft", "sd3"),
    ],
)
def test_a_unets_lora_for_a_transformer(
    folders: dict[str, Path], transformers: dict[str, Path], tmp_path: Path, of: str, form: str,
    on: str,
) -> None:  # fmt: skip
    file = written(tmp_path, load(folders[of]), form, 0)
    title = {"flux": "Flux", "sd3": "Stable Diffusion 3"}[on]
    message = rf"the LoRA {file} does not fit the model: .*; choose a LoRA .* trained for {title}"
    with pytest.raises(ModelError, match=message):
        load_transformer(transformers[on], [LoRA(str(file))])


@pytest.mark.parametrize(("of", "on"), [("sd3", "flux"), ("flux", "sd3")])
def test_a_lora_for_the_other_transformer(
    transformers: dict[str, Path], tmp_path: Path, of: str, on: str
) -> None:
    save_file(in_peft(load_transformer(transformers[of]), 0), tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match=r"does not fit the model: .* layers \(.*; choose a LoRA"):
        load_transformer(transformers[on], [LoRA(str(tmp_path))])


def test_a_weights_change_is_the_factors_product(folders: dict[str, Path], tmp_path: Path) -> None:
    plain = load(folders["sd"])
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    down, up = torch.randn(3, 16), torch.randn(16, 3)
    stem = f"lora_unet_{name.replace('.', '_')}"
    save_file(
        {
            f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up,
            f"{stem}.alpha": torch.tensor(6.0),
        },
        tmp_path / FILE,
    )  # fmt: skip
    model = load(folders["sd"], [LoRA(str(tmp_path), 0.5)])
    weights = model.unet.state_dict()
    for other, weight in plain.unet.state_dict().items():
        expected = weight + 0.5 * 6 / 3 * up @ down if other == f"{name}.weight" else weight
        torch.testing.assert_close(weights[other], expected)
    assert not any(parameter.requires_grad for parameter in model.unet.parameters())


@pytest.mark.parametrize(
    ("of", "on", "message"),
    [
        ("sd", "xl", r"layers \(unet\..*\) are not in it or .* was trained for SDXL"),
        ("xl", "sd", r"layers \(.*\) are not in it or .* for Stable Diffusion 1\.x or 2\.x"),
    ],
)
@pytest.mark.parametrize("form", ["kohya", "peft"])
def test_a_lora_for_another_family(
    folders: dict[str, Path], tmp_path: Path, form: str, of: str, on: str, message: str
) -> None:
    file = written(tmp_path, load(folders[of]), form, 0)
    with pytest.raises(ModelError, match=rf"the LoRA {file} does not fit the model: .*{message}"):
        load(folders[on], [LoRA(str(file))])


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"transformer.a.lora_A.weight": (2, 4), "transformer.a.lora_B.weight": (4, 2)}, "1 of"),
        ({"unet.conv_in.lora_A.weight": (2, 4, 3, 3)}, r"1 of its 1 layers \(unet\.conv_in\)"),
        ({"lora_unet_conv_in.dora_scale": (1,)}, "is DoRA, by its weight lora_unet_conv_in.dora_"),
        ({"lora_unet_conv_in.hada_w1_a": (1,)}, "is LoHa, by its weight .*; expected a LoRA, with"),
        ({"lora_unet_conv_in.lokr_w1": (1,)}, "is LoKr, by its weight"),
        ({"something": (1,)}, r"does not fit the model: 1 of its 1 layers \(something"),
        ({}, r"0 of its 0 layers \(none is known\)"),
    ],
)
def test_what_is_no_lora_for_this_model(
    folders: dict[str, Path], tmp_path: Path, weights: dict[str, tuple[int, ...]], message: str
) -> None:
    file = tmp_path / "a.safetensors"
    save_file({name: torch.ones(shape) for name, shape in weights.items()}, file)
    with pytest.raises(ModelError, match=message):
        load(folders["sd"], [LoRA(str(file))])


def test_places_without_a_lora(folders: dict[str, Path], tmp_path: Path) -> None:
    def message_of(model: str) -> str:
        with pytest.raises(ModelError) as caught:
            load(folders["sd"], [LoRA(model)])
        return str(caught.value)

    assert "expected one *.safetensors file or pytorch_lora" in message_of(str(tmp_path))
    (tmp_path / "a.pt").touch()
    assert "may hold a pickle" in message_of(str(tmp_path / "a.pt"))
    (tmp_path / "a.safetensors").write_bytes(b"PK\3\4")
    assert "holds a pickle" in message_of(str(tmp_path))
    (tmp_path / "b.safetensors").touch()
    assert "found a.safetensors, b.safetensors; give the file's own path" in message_of(
        str(tmp_path)
    )
    assert "does not exist" in message_of("./gone.safetensors")
    for hub in ("nobody/nothing", "nobody/nothing/some.safetensors"):
        assert "hub model 'nobody/nothing' could not be fetched" in message_of(hub)
    with pytest.raises(InputError, match="scale is a finite number, got nan"):
        LoRA("a", float("nan"))


def test_a_family_that_takes_none() -> None:
    with pytest.raises(ModelError, match="a GaussianFlow takes no LoRAs; leave loras out"):
        GaussianFlow().fuse([LoRA("somewhere")])
