import copy
import dataclasses
import json
import re
import shutil
import warnings
from errno import ENOMEM
from os import strerror
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention import BasicTransformerBlock
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTokenizer

from tests.diffusion.making import with_unet
from tokenflow.diffusion import Backbone, Conditioning, ModelError, StableDiffusion
from tokenflow.diffusion.unet import decoder_layers
from tokenflow.editors import PnP, Prompts
from tokenflow.engine.network import EditedNetwork
from tokenflow.errors import InputError

COMPONENTS = StableDiffusion.components
NETWORKS = ("unet", "vae", "text_encoder")


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be spoilt."""
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


def tiny_vae(blocks: int) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=(8,) * blocks,
        norm_num_groups=4,
        scaling_factor=0.18215,
    )


def with_parts(backbone: StableDiffusion, **parts: Any) -> StableDiffusion:
    return StableDiffusion(
        **{name: parts.get(name, getattr(backbone, name)) for name in COMPONENTS}
    )


def set_config(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_loads_a_frozen_model(backbone: Backbone) -> None:
    assert backbone.device == torch.device("cpu")
    assert backbone.dtype == torch.float32
    for name in NETWORKS:
        network = getattr(backbone, name)
        assert not network.training
        assert not any(p.requires_grad for p in network.parameters())


@pytest.mark.parametrize("model", ["/nowhere/model", "./model", "~/model", "a/b/c"])
def test_a_folder_that_is_not_there(model: str) -> None:
    with pytest.raises(ModelError, match=rf"{model}' does not exist; give the folder that holds"):
        Backbone.load(model)


def test_a_folder_in_the_users_home(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Backbone.load(f"~/{folder.name}", "cpu", "float32").multiple == 16


def test_a_file_for_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "clip.mp4").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ModelError, match=r"model folder or a \*\.safetensors file, and clip\.mp4 is none"
    ):
        Backbone.load("clip.mp4")


def test_no_model() -> None:
    with pytest.raises(ModelError, match=r"expected a model folder .*, but none was given; give"):
        Backbone.load("")


@pytest.mark.parametrize("name", COMPONENTS)
def test_a_missing_component(folder: Path, name: str) -> None:
    shutil.rmtree(folder / name)
    with pytest.raises(ModelError, match=rf"has no {name}/; expected diffusers' layout with unet,"):
        Backbone.load(folder)


@pytest.mark.parametrize("name", NETWORKS)
def test_pickled_weights_are_not_read(folder: Path, name: str) -> None:
    for file in (folder / name).glob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))
    with pytest.raises(ModelError, match=r"no \*\.safetensors file \(found .*\.bin'\].*convert"):
        Backbone.load(folder)


def test_a_folder_with_weights_in_half_precision_alone(folder: Path, backbone: Backbone) -> None:
    for name in NETWORKS:
        (file,) = (folder / name).glob("*.safetensors")
        half = {name: weight.half() for name, weight in load_file(file).items()}
        file.unlink()
        save_file(half, file.with_suffix(".fp16.safetensors"), metadata={"format": "pt"})
    loaded = Backbone.load(folder, "cpu", "float32")
    assert loaded.dtype == torch.float32
    text, expected = (model.embed(["a ball"])["embeddings"] for model in (loaded, backbone))
    assert torch.allclose(text, expected, atol=1e-2)  # of half precision


@pytest.mark.parametrize("other", ["{}.non_ema", "{}.ema", "pytorch_lora_weights"])
@pytest.mark.parametrize("variant", ["fp16", "bf16", "fp32"])
def test_a_variant_beside_other_files(
    folder: Path, backbone: Backbone, variant: str, other: str
) -> None:
    for name in NETWORKS:
        (file,) = (folder / name).glob("*.safetensors")
        file.rename(file.with_name(f"{file.stem}.{variant}.safetensors"))
        file.with_name(f"{other.format(file.stem)}.safetensors").write_bytes(b"not to be read")
    assert Backbone.load(folder, "cpu", "float32").fingerprint == backbone.fingerprint


def test_plain_weights_go_before_variants(folder: Path, backbone: Backbone) -> None:
    for name in NETWORKS:
        (file,) = (folder / name).glob("*.safetensors")
        file.with_name(file.name.replace(".", ".fp16.")).write_bytes(b"not to be read")
    assert Backbone.load(folder, "cpu", "float32").fingerprint == backbone.fingerprint


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_weights_in_parts(folder: Path, backbone: Backbone, variant: str | None) -> None:
    for name in NETWORKS:
        for file in (folder / name).glob("*.safetensors"):
            file.unlink()
        network = getattr(backbone, name)
        network.save_pretrained(folder / name, max_shard_size="100KB", variant=variant)
        (folder / name / "a.lora.safetensors").write_bytes(b"not to be read")
    assert list((folder / "unet").glob("*.index*.json"))
    assert Backbone.load(folder, "cpu", "float32").fingerprint == backbone.fingerprint


@pytest.mark.parametrize("only", [".non_ema", "_lora"])
@pytest.mark.parametrize("name", NETWORKS)
def test_weights_of_other_names_are_listed(folder: Path, name: str, only: str) -> None:
    (file,) = (folder / name).glob("*.safetensors")
    stem = file.stem
    file.rename(other := file.with_name(f"{stem}{only}.safetensors"))
    message = rf"{name} has no .* expected {stem}\.safetensors, .* found {re.escape(other.name)};"
    with pytest.raises(ModelError, match=message):
        Backbone.load(folder, "cpu", "float32")


@pytest.mark.parametrize("value", ["1", None, 0, -1.0, float("nan"), [1]])
def test_a_scaling_factor_that_is_no_number(folder: Path, value: Any) -> None:
    set_config(folder / "vae" / "config.json", scaling_factor=value)
    with pytest.raises(ModelError, match=r"scaling_factor is .*, expected a number above 0 and"):
        Backbone.load(folder, "cpu", "float32")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("could not create a primitive"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        OSError(ENOMEM, strerror(ENOMEM)),
    ],
)
@pytest.mark.parametrize("method", ["from_pretrained", "to"])
def test_a_model_that_the_memory_does_not_hold(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, method: str, error: Exception
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(UNet2DConditionModel, method, fail)
    with pytest.raises(InputError, match=r"not enough memory on cpu for the model .*; take a sm"):
        Backbone.load(model_folder, "cpu", "float32")


def test_a_hub_model_without_safetensors(monkeypatch: pytest.MonkeyPatch) -> None:
    told = "owner/name does not appear to have a file named diffusion_pytorch_model.safetensors."

    def refuse(*args: Any, **options: Any) -> None:
        raise OSError(told)

    index = {"_class_name": "StableDiffusionPipeline"}
    monkeypatch.setattr(DiffusionPipeline, "load_config", lambda *_, **__: index)
    monkeypatch.setattr(UNet2DConditionModel, "from_pretrained", refuse)
    message = r"unet of the hub model 'owner/name' has no safetensors, .* pickled .* convert it"
    with pytest.raises(ModelError, match=message):
        Backbone.load("owner/name", "cpu", "float32")


def test_no_weights_at_all(folder: Path) -> None:
    for file in (folder / "unet").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(ModelError, match="found no weights"):
        Backbone.load(folder)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_parameter_without_weights(folder: Path, name: str) -> None:
    """Diffusers and transformers would leave it random, or on no device."""
    (file,) = (folder / name).glob("*.safetensors")
    weights = load_file(file)
    lost = min(weights)
    del weights[lost]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"{name} .* no weights for 1 .* such as .*{lost}"):
        Backbone.load(folder, "cpu", "float32")


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_of_another_shape(folder: Path, name: str) -> None:
    (file,) = (folder / name).glob("*.safetensors")
    weights = load_file(file)
    weights[min(weights)] = torch.zeros(3)
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"{name} of the model folder .* does not load"):
        Backbone.load(folder, "cpu", "float32")


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_that_are_cut_short(folder: Path, name: str) -> None:
    for file in (folder / name).glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ModelError, match=f"{name} of the model folder .* does not load"):
        Backbone.load(folder)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("unet", "config.json"),
        ("vae", "config.json"),
        ("text_encoder", "config.json"),
        ("scheduler", "scheduler_config.json"),
    ],
)
@pytest.mark.parametrize("text", ["{", None])
def test_configuration_that_does_not_parse(
    folder: Path, name: str, file: str, text: str | None
) -> None:
    if text is None:
        (folder / name / file).unlink()
    else:
        (folder / name / file).write_text(text)
    with pytest.raises(ModelError, match=f"{name} of the model folder .* does not load"):
        Backbone.load(folder)


@pytest.mark.parametrize("kept", [[], ["tokenizer_config.json"], ["vocab.json"], ["merges.txt"]])
def test_a_tokenizer_without_vocabulary(folder: Path, kept: list[str]) -> None:
    for file in (folder / "tokenizer").iterdir():
        if file.name not in kept:
            file.unlink()
    with pytest.raises(ModelError, match=r"expected tokenizer.json, or vocab.json and merges.txt"):
        Backbone.load(folder, "cpu", "float32")


@pytest.mark.parametrize("lost", [["tokenizer.json"], ["vocab.json", "merges.txt"]])
def test_either_form_of_a_vocabulary_is_enough(folder: Path, lost: list[str]) -> None:
    whole = Backbone.load(folder, "cpu", "float32").embed(["a red ball"])
    for name in lost:
        (folder / "tokenizer" / name).unlink()
    assert Backbone.load(folder, "cpu", "float32").embed(["a red ball"]).same_as(whole)


@pytest.mark.parametrize(("file", "text"), [("tokenizer.json", "{}"), ("vocab.json", '{"a": 0}')])
def test_a_damaged_vocabulary(folder: Path, file: str, text: str) -> None:
    (folder / "tokenizer" / "tokenizer.json").unlink()
    (folder / "tokenizer" / file).write_text(text)
    with pytest.raises(ModelError, match=r"tokenizer of the model folder .* does not load"):
        Backbone.load(folder, "cpu", "float32")


def test_another_models_tokenizer(backbone: StableDiffusion, tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text('{"a</w>": 0}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    small = CLIPTokenizer.from_pretrained(tmp_path)
    with pytest.raises(ModelError, match="knows 3 tokens and the text encoder 130: prompts would"):
        with_parts(backbone, tokenizer=small)


def test_a_hub_model_without_network() -> None:
    with pytest.raises(ModelError, match=r"Without network, download .* give its folder"):
        Backbone.load("nobody/no-such-model", "cpu", "float32")


@pytest.mark.parametrize("kind", ["sample", "flow_prediction", None])
def test_an_unknown_prediction(folder: Path, kind: str | None) -> None:
    set_config(folder / "scheduler" / "scheduler_config.json", prediction_type=kind)
    with pytest.raises(ModelError, match=f"predicts {kind!r}, expected 'epsilon' or 'v_predict"):
        Backbone.load(folder, "cpu", "float32")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 64,
                "cross_attention_dim": 32,
            },
            r"other inputs than .* \(addition_embed_type 'text_time'\), .* expected Stable",
        ),
        (
            {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 64},
            r"class_embed_type 'projection'",
        ),
        ({"num_class_embeds": 4}, r"num_class_embeds 4"),
        ({"encoder_hid_dim": 24}, r"encoder_hid_dim 24, encoder_hid_dim_type 'text_proj'"),
        ({"only_cross_attention": True}, r"only cross-attention, none among a frame's tokens"),
        ({"cross_attention_dim": 32}, r"width 32 and the text encoder makes 16; expected parts"),
        ({"cross_attention_dim": (16, 16, 16, 32)}, r"width .*32.* and the text encoder makes 16"),
    ],
)
def test_a_unet_that_asks_for_more_than_a_prompt(
    backbone: StableDiffusion, changes: dict[str, Any], message: str
) -> None:
    unet = UNet2DConditionModel.from_config({**backbone.unet.config, **changes})
    with pytest.raises(ModelError, match=message):
        with_parts(backbone, unet=unet)


def test_the_width_may_be_given_for_each_block(backbone: StableDiffusion) -> None:
    widths = {"cross_attention_dim": (16,) * 4}
    with_parts(backbone, unet=UNet2DConditionModel.from_config({**backbone.unet.config, **widths}))


def test_v_prediction(folder: Path, backbone: Backbone) -> None:
    set_config(folder / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    model = Backbone.load(folder, "cpu", "float32")
    assert model.schedule(3).prediction == "v_prediction"
    assert backbone.schedule(3).prediction == "epsilon"


@pytest.mark.parametrize(("dtype", "expected"), [("bfloat16", torch.bfloat16)])
def test_latents_are_float32_whatever_the_networks(
    model_folder: Path, dtype: str, expected: torch.dtype
) -> None:
    model = Backbone.load(model_folder, device="cpu", dtype=dtype)
    assert {getattr(model, name).dtype for name in NETWORKS} == {expected}
    latents = model.encode(torch.rand(1, 3, 16, 16))
    assert latents.dtype == torch.float32
    assert model.decode(latents).dtype == torch.float32
    text = model.embed(["a ball"])
    assert text["embeddings"].dtype == expected
    with torch.no_grad():
        assert model.predict(latents, 1, text).dtype == torch.float32


def test_prediction_is_the_unets_output(backbone: StableDiffusion) -> None:
    x, text = torch.randn(2, 4, 8, 8), backbone.embed(["a ball", ""])
    with torch.no_grad():
        expected = backbone.unet(x, 334, encoder_hidden_states=text["embeddings"]).sample
        assert torch.equal(backbone.predict(x, 334, text), expected)


@pytest.mark.parametrize("t", [334, 0.5])
def test_the_unet_is_given_the_time_on_its_device(backbone: StableDiffusion, t: float) -> None:
    device = torch.device("meta")  # where a copy of a number's value would fail
    unet = copy.deepcopy(backbone.unet).to(device)
    model = with_parts(backbone, unet=unet)
    text = Conditioning(embeddings=torch.empty(1, 16, 16, device=device))
    given: list[Any] = []
    unet.register_forward_pre_hook(lambda _, inputs: given.append(inputs[1]))
    with torch.no_grad():
        model.predict(torch.empty(1, 4, 8, 8), t, text)
    assert given[0].device == device
    assert given[0].is_floating_point() == isinstance(t, float)


def test_extra_arguments_reach_the_unet(backbone: StableDiffusion) -> None:
    x, text = torch.randn(1, 4, 8, 8), backbone.embed([""])
    middle = torch.ones(1, 16, 1, 1)
    with torch.no_grad():
        plain = backbone.predict(x, 1, text)
        residuals = [torch.zeros(())] * 12
        further = {
            "mid_block_additional_residual": middle, "down_block_additional_residuals": residuals
        }  # fmt: skip
        other = backbone.predict(x, 1, text, **further)
    assert not torch.allclose(plain, other)
    assert further.keys() <= backbone.further_inputs
    assert not {"sample", "timestep", "encoder_hidden_states"} & backbone.further_inputs


@pytest.mark.parametrize("blocks", [2, 4])
def test_frames_to_latents_and_back(backbone: StableDiffusion, blocks: int) -> None:
    model = with_parts(backbone, vae=tiny_vae(blocks))
    scale = 2 ** (blocks - 1)
    assert model.latent_scale == scale
    assert model.multiple == scale * 8  # three halvings in the UNet
    frames = torch.rand(2, 3, model.multiple, 2 * model.multiple)
    latents = model.encode(frames)
    assert latents.shape == (2, 4, 8, 16)
    decoded = model.decode(latents)
    assert decoded.shape == frames.shape
    with torch.no_grad():
        posterior = model.vae.encode(2 * frames - 1).latent_dist
        assert torch.equal(latents, posterior.mean * 0.18215)
        pixels = model.vae.decode(latents / 0.18215).sample
        assert torch.equal(decoded, (pixels / 2 + 0.5).clamp(0, 1))


def test_the_decoder_takes_channels_last_on_a_cpu(backbone: StableDiffusion) -> None:
    vae = copy.deepcopy(backbone.vae).to(memory_format=torch.contiguous_format)
    plain = with_parts(backbone, vae=vae)
    kernel = "decoder.conv_in.weight"
    assert backbone.vae.get_parameter(kernel).is_contiguous(memory_format=torch.channels_last)
    assert not vae.get_parameter(kernel).is_contiguous(memory_format=torch.channels_last)
    frames = torch.rand(2, 3, 16, 32)
    latents = plain.encode(frames)
    assert torch.equal(backbone.encode(frames), latents)
    # sums of about 100 products each, in another order
    torch.testing.assert_close(backbone.decode(latents), plain.decode(latents), atol=1e-5, rtol=0)
    assert plain.fingerprint == backbone.fingerprint


def test_the_feed_forward_takes_image_by_image_on_a_cpu(backbone: StableDiffusion) -> None:
    plain = with_parts(backbone, unet=copy.deepcopy(backbone.unet))
    for block in plain.unet.modules():
        if isinstance(block, BasicTransformerBlock):
            block.set_chunk_feed_forward(None)
    batches: list[int] = []
    first = backbone.unet.down_blocks[0].attentions[0].transformer_blocks[0].ff
    x, text = torch.randn(3, 4, 8, 8), backbone.embed(["a ball", "", ""])
    with first.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0]))):
        found = backbone.predict(x, 334, text)
    assert batches == [1, 1, 1]
    # products of matrices are summed in blocks that depend on their height
    torch.testing.assert_close(found, plain.predict(x, 334, text), atol=1e-5, rtol=1e-5)


def test_decoded_frames_stay_within_0_and_1(backbone: Backbone) -> None:
    frames = backbone.decode(1000 * torch.randn(2, 4, 8, 8))
    assert frames.min() == 0
    assert frames.max() == 1


def test_the_unet_keeps_the_size_of_frames_of_the_least_size(backbone: Backbone) -> None:
    side = backbone.multiple
    latents = backbone.encode(torch.rand(1, 3, side, side))
    with torch.no_grad():
        output = backbone.predict(latents, 1, backbone.embed([""]))
    assert output.shape == latents.shape


def pipeline_embeddings(backbone: StableDiffusion, prompts: list[str]) -> Tensor:
    parts = {name: getattr(backbone, name) for name in COMPONENTS}
    pipeline = StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    return pipeline.encode_prompt(prompts, "cpu", 1, False)[0]


def test_embeddings_are_those_of_diffusers_pipeline(backbone: StableDiffusion) -> None:
    prompts = ["a red ball on sand", "", "a ball on a ball " * 20]  # the last is cut
    with pytest.warns(UserWarning, match="cut"):
        conditioning = backbone.embed(prompts)
    assert list(conditioning.tensors) == ["embeddings"]
    embeddings = conditioning["embeddings"]
    assert embeddings.shape == (3, backbone.tokenizer.model_max_length, 16)
    assert torch.equal(embeddings, pipeline_embeddings(backbone, prompts))
    assert not torch.allclose(embeddings[0], embeddings[1])


def test_a_prompt_that_is_cut_is_told(backbone: Backbone) -> None:
    whole = " ".join(["ball"] * 14)  # and a token each for begin and end
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backbone.embed([whole])
    message = r"at most 14 tokens, got 16; the end is cut off: 'on SAND' of 'ball"
    with pytest.warns(UserWarning, match=message):
        backbone.embed(["a ball", f"{whole} on SAND"])


def test_layers_are_the_papers(tmp_path: Path) -> None:
    """From the fourth of twelve decoder layers up (Tumanyan et al.)."""
    backbone = Backbone.load(with_unet(tmp_path / "model", layers_per_block=2), "cpu", "float32")
    assert isinstance(backbone, StableDiffusion)
    assert len(decoder_layers(backbone.unet)) == 12
    places = [(1, 1), (1, 2), (2, 0), (2, 1), (2, 2), (3, 0), (3, 1), (3, 2)]
    assert backbone.layers("structure") == [f"up_blocks.{b}.resnets.{r}.conv2" for b, r in places]
    sites = [f"up_blocks.{b}.attentions.{r}.transformer_blocks.0.attn1" for b, r in places]
    for role, projection in (("queries", "to_q"), ("keys", "to_k"), ("values", "to_v")):
        assert backbone.layers(role) == [f"{site}.{projection}" for site in sites]
    for role in ("structure", "queries", "keys", "values"):
        for name in backbone.layers(role):
            backbone.network.get_submodule(name)


@pytest.fixture
def consistency_model(backbone: StableDiffusion) -> StableDiffusion:
    """With a UNet that embeds the scale of guidance, as full LCMs have."""
    torch.manual_seed(2)
    config = {**backbone.unet.config, "time_cond_proj_dim": 10}
    return with_parts(backbone, unet=UNet2DConditionModel.from_config(config))


def test_embedded_guidance_is_that_of_diffusers_pipeline(
    consistency_model: StableDiffusion,
) -> None:
    model = consistency_model
    pipeline = LatentConsistencyModelPipeline(
        model.vae, model.text_encoder, model.tokenizer, model.unet, LCMScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    passes: list[tuple[Any, ...]] = []
    with model.unet.register_forward_hook(
        lambda _, given, named, out: passes.append((*given, out[0])), with_kwargs=True
    ):
        pipeline(["a red ball", "a box"], num_inference_steps=3, guidance_scale=4.0)
    text = model.embed(["a red ball", "a box"])
    assert text["guidance"].tolist() == [1, 1]
    told = Conditioning(embeddings=text["embeddings"], guidance=torch.tensor([4.0, 4.0]))
    assert len(passes) == 3
    for latents, t, expected in passes:
        found = model.predict(latents, int(t), told)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        assert (model.predict(latents, int(t), text) - expected).abs().max() > 1e-3


def test_a_model_that_embeds_its_guidance_runs_no_negative_branch(
    consistency_model: StableDiffusion, backbone: StableDiffusion
) -> None:
    assert consistency_model.defaults == dataclasses.replace(backbone.defaults, guidance=8.5)
    assert "timestep_cond" not in consistency_model.further_inputs
    network = EditedNetwork(consistency_model, PnP(), Prompts("a ball"))
    assert network.branches_for(8.5) == ("source", "prompt")


@pytest.mark.parametrize(
    ("file", "config"),
    [
        ("unet/config.json", "[1]"),
        ("unet/config.json", '{"in_channels": "4"}'),
        ("scheduler/scheduler_config.json", "[1]"),
    ],
)
def test_a_configuration_of_another_kind_is_refused(tmp_path: Path, file: str, config: str) -> None:
    files = {"unet/config.json": "{}", "scheduler/scheduler_config.json": "{}", file: config}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    with pytest.raises(ModelError, match=re.escape(str(tmp_path))):
        Backbone.describe(tmp_path)


@pytest.mark.parametrize("name", ["a" * 5000, "a\0b"])
def test_a_name_that_no_file_can_have_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match=r"File name too long|'a\\x00b' does not exist"):
        Backbone.describe(name)


def test_defaults_come_from_a_file_beside_the_index(folder: Path) -> None:
    plain = Backbone.load(folder, "cpu", "float32")
    (folder / "tokenflow.json").write_text('{"guidance": 3.5}')
    file = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text()) | {"_class_name": "LCMScheduler"}
    file.write_text(json.dumps(config))
    own = Backbone.load(folder, "cpu", "float32")
    assert own.traits.few_steps
    assert own.defaults == dataclasses.replace(plain.defaults, guidance=3.5)
    described, found = Backbone.describe(folder), own.traits
    assert dataclasses.replace(described, config={}) == dataclasses.replace(found, config={})
    options = {k: v for k, v in found.config.items() if not k.startswith("_")}
    assert {k: described.config[k] for k in options} == options
    assert own.fingerprint != plain.fingerprint  # they change the edit
