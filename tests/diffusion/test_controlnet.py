import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    ControlNetModel,
    SD3ControlNetModel,
    StableDiffusion3ControlNetPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.diffusion.making import Plain, make_controlnet, pipeline_of, write_tiny_xl
from tests.diffusion.making_transformers import parts, randomised, write_tiny_sd3
from tests.gaussian_flow import GaussianFlow
from tokenflow.diffusion import (
    Backbone,
    ModelError,
    StableDiffusion,
    StableDiffusion3,
    StableDiffusionXL,
    Trajectory,
    load_controlnet,
)
from tokenflow.editors import Condition, Control, ControlNet, Editor, Prompts, SDEdit
from tokenflow.engine import Settings, edit_clip, edit_latents
from tokenflow.engine.ranks.group import FrameGroup
from tokenflow.propagation import NNField
from tokenflow.testing import tiny_clip
from tokenflow.testing.state import backbone_state
from tokenflow.testing.threads import on_ranks
from tokenflow.video import Clip


@pytest.fixture
def folder(tmp_path: Path, backbone: StableDiffusion) -> Path:
    """A tiny ControlNet's folder, to be spoilt."""
    return make_controlnet(tmp_path / "controlnet", backbone.unet)


def test_loads_a_frozen_network_in_the_backbones_dtype(
    folder: Path, backbone: StableDiffusion, model_folder: Path
) -> None:
    network = load_controlnet(folder, backbone).network
    assert isinstance(network, ControlNetModel)
    assert (network.device, network.dtype) == (backbone.device, torch.float32)
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    expected = ControlNetModel.from_pretrained(folder).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in network.state_dict().items())
    half = Backbone.load(model_folder, device="cpu", dtype="bfloat16")
    assert load_controlnet(str(folder), half).network.dtype == torch.bfloat16


@pytest.mark.parametrize("model", ["/nowhere/model", "./model", "~/model", "a/b/c"])
def test_a_folder_that_is_not_there(model: str, backbone: StableDiffusion) -> None:
    with pytest.raises(ModelError, match=rf"{model}' does not exist; .* holds config\.json"):
        load_controlnet(model, backbone)


def test_a_folder_in_the_users_home(
    folder: Path, backbone: StableDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_controlnet(f"~/{folder.name}", backbone).network.dtype == torch.float32


def test_pickled_weights_are_not_read(folder: Path, backbone: StableDiffusion) -> None:
    for file in folder.glob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))
    with pytest.raises(ModelError, match=r"no \*\.safetensors file \(found .*\.bin'\].*convert"):
        load_controlnet(folder, backbone)


@pytest.mark.parametrize("text", [b"{", b"[]", b'{"weight_map": 3}', b"\xff\xfe"])
def test_an_index_that_is_none(text: bytes, folder: Path, backbone: StableDiffusion) -> None:
    (folder / "x.safetensors.index.json").write_bytes(text)
    with pytest.raises(ModelError, match=r"x\.safetensors\.index\.json is no index of weights"):
        load_controlnet(folder, backbone)


def test_a_hub_model_without_network(backbone: StableDiffusion) -> None:
    with pytest.raises(ModelError, match=r"the ControlNet of the hub .* Without network, download"):
        load_controlnet("nobody/no-such-model", backbone)


def test_a_whole_models_folder(model_folder: Path, backbone: StableDiffusion) -> None:
    with pytest.raises(ModelError, match=r"has no \*\.safetensors file \(found no weights\)"):
        load_controlnet(model_folder, backbone)


def test_a_parameter_without_weights(folder: Path, backbone: StableDiffusion) -> None:
    (file,) = folder.glob("*.safetensors")
    weights = load_file(file)
    lost = min(weights)
    del weights[lost]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"the ControlNet .* no weights for 1 .* as .*{lost}"):
        load_controlnet(folder, backbone)


@pytest.mark.parametrize("text", ["{", None])
def test_configuration_that_does_not_parse(
    folder: Path, backbone: StableDiffusion, text: str | None
) -> None:
    file = folder / "config.json"
    file.unlink()
    if text is not None:
        file.write_text(text)
    with pytest.raises(ModelError, match=r"the ControlNet of the model folder .* does not load"):
        load_controlnet(folder, backbone)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cross_attention_dim": 24}, r"expected cross-attention width 16 \(found 24\)"),
        (
            {"block_out_channels": (8, 8, 8, 16), "attention_head_dim": 1},
            r"expected block channels \(8, 8, 16, 16\) \(found \(8, 8, 8, 16\)\)",
        ),
        ({"layers_per_block": 2}, r"expected layers per block 1 \(found 2\)"),
        ({"in_channels": 9}, r"expected latent channels 4 \(found 9\)"),
        (
            {"conditioning_embedding_out_channels": (4, 8, 8, 8)},
            r"expected pixels per latent 2 \(found 8\)",
        ),
        ({"num_class_embeds": 4}, r"expected classes None \(found 4\)"),
        ({"class_embed_type": "timestep"}, r"expected class embedding None \(found timestep\)"),
        ({"conditioning_channels": 1}, r"expected channels of the control image 3 \(found 1\)"),
        (
            {"cross_attention_dim": 32, "layers_per_block": 2},
            r"cross-attention width 16 \(found 32\), layers per block 1 \(found 2\); choose one",
        ),
    ],
)
def test_a_controlnet_of_another_backbone(
    tmp_path: Path, backbone: StableDiffusion, changes: dict[str, Any], message: str
) -> None:
    folder = make_controlnet(tmp_path / "other", backbone.unet, **changes)
    with pytest.raises(ModelError, match=r"other was made for another model: .*" + message):
        load_controlnet(folder, backbone)
    if not changes.keys() & {"conditioning_embedding_out_channels", "conditioning_channels"}:
        with pytest.raises(ModelError, match=message):  # which the networks alone can tell
            ControlNet(str(folder)).check_model(backbone.traits)


def test_a_unets_folder_is_no_controlnet(model_folder: Path, backbone: StableDiffusion) -> None:
    with pytest.raises(ModelError, match=r"no weights for .* such as controlnet_"):
        load_controlnet(model_folder / "unet", backbone)


def test_lists_and_tuples_in_a_configuration_are_the_same(
    folder: Path, backbone: StableDiffusion
) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert isinstance(config["block_out_channels"], list)
    load_controlnet(folder, backbone)
    ControlNet(str(folder)).check_model(backbone.traits)


def test_what_is_given_for_each_block_may_be_given_once(
    folder: Path, backbone: StableDiffusion
) -> None:
    def with_unet(**changes: Any) -> StableDiffusion:
        unet = UNet2DConditionModel.from_config({**backbone.unet.config, **changes})
        parts = backbone.vae, backbone.text_encoder, backbone.tokenizer, backbone.scheduler
        return StableDiffusion(unet, *parts)

    each = with_unet(cross_attention_dim=(16,) * 4, layers_per_block=[1] * 4)
    load_controlnet(folder, each)
    with pytest.raises(ModelError, match=r"layers per block \(1, 1, 1, 2\) \(found 1\)"):
        load_controlnet(folder, with_unet(layers_per_block=[1, 1, 1, 2]))


class Inverted(Condition):
    """The negative of every frame: control images that differ from frame to frame."""

    def of(self, clip: Clip) -> Tensor:
        return 1 - clip.frames


class Controlled(Plain, ControlNet):
    """Samples under control, by no other editor."""


def pipeline_with(model: Backbone, networks: list[Any]) -> Any:
    """diffusers' own, with a model's parts and ControlNets."""
    one = networks[0] if len(networks) == 1 else networks
    if isinstance(model, StableDiffusion3):
        made: Any = StableDiffusion3ControlNetPipeline(**parts(model), controlnet=one)
        # it samples the latents of control images, and has no variance then
        made.vae.encoder.conv_out.weight[model.latent_channels :] = 0
        made.vae.encoder.conv_out.bias[model.latent_channels :] = -60
    elif isinstance(model, StableDiffusionXL):
        made = StableDiffusionXLControlNetPipeline.from_pipe(pipeline_of(model), controlnet=one)
    else:
        made = StableDiffusionControlNetPipeline.from_pipe(pipeline_of(model), controlnet=one)
    made.set_progress_bar_config(disable=True)
    return made


def equals_the_pipeline(model: Backbone, folders: list[Path]) -> None:
    """Samples two images under control as diffusers' pipeline does."""
    clip, steps = Clip.from_frames(torch.rand(2, 3, 16, 32)), 3
    noise = torch.randn(2, 4, 8, 16, generator=torch.Generator().manual_seed(1))
    first, *more = (Control(str(folder), Inverted(), 0.7) for folder in folders)
    editor = Controlled(**vars(first), further=more)
    pipeline = pipeline_with(model, [load_controlnet(one, model).network for one in folders])
    flow = isinstance(model, StableDiffusion3)  # whose pipeline scales no tensors
    shown = 1 - 2 * clip.frames if flow else 1 - clip.frames
    images, scale = [shown for _ in folders], [0.7 for _ in folders]
    image = "control_image" if flow else "image"
    given = {image: images if more else images[0]}
    expected = pipeline(
        2 * ["a red ball"], negative_prompt=2 * ["a box"], num_inference_steps=steps,
        guidance_scale=4.0, latents=noise.clone(), output_type="latent", height=16, width=32,
        controlnet_conditioning_scale=scale if more else 0.7, **given,
    ).images  # fmt: skip
    editor.prepare(model, clip)
    schedule = model.schedule(steps, (8, 16))

    def sampled(editor: Editor) -> Tensor:
        return edit_latents(
            model, Trajectory.empty(noise, schedule, None), schedule,
            Prompts("a red ball", "a box"), editor, NNField(),
            Settings(steps=steps, guidance=4.0, consistency="none"), x=noise,
        )  # fmt: skip

    found = sampled(editor)
    # float32, sums in another order, through three guided steps of latents up to 12
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert (found - sampled(Plain())).abs().max() > 0.05


@pytest.mark.parametrize("kind", ["sd", "xl"])
def test_sampling_with_a_unets_is_diffusers_pipeline(
    backbone: StableDiffusion, tmp_path: Path, kind: str
) -> None:
    model: Any = backbone
    if kind == "xl":
        model = Backbone.load(write_tiny_xl(tmp_path / "model"), "cpu", "float32")
    equals_the_pipeline(model, [make_controlnet(tmp_path / str(n), model.unet, n) for n in (0, 1)])


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusion3:
    found = Backbone.load(write_tiny_sd3(tmp_path_factory.mktemp("sd3")), "cpu", "float32")
    assert isinstance(found, StableDiffusion3)
    return found


def make_sd3_controlnet(folder: Path, model: StableDiffusion3, **changes: Any) -> Path:
    config = {**model.transformer.config, "num_layers": 2, **changes}
    with torch.random.fork_rng():
        torch.manual_seed(4)
        randomised(SD3ControlNetModel.from_config(config)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"force_zeros_for_pooled_projection": False},
        {  # Stability's for SD 3.5
            "use_pos_embed": False, "joint_attention_dim": None, "dual_attention_layers": (),
            "pos_embed_type": None, "force_zeros_for_pooled_projection": False, "qk_norm": None,
        },
    ],
)  # fmt: skip
def test_sampling_with_sd3s_is_diffusers_pipeline(
    sd3: StableDiffusion3, tmp_path: Path, changes: dict[str, Any]
) -> None:
    equals_the_pipeline(sd3, [make_sd3_controlnet(tmp_path / "a", sd3, **changes)])


@pytest.mark.parametrize("kind", ["xl", "sd3"])
def test_a_clip_is_edited_under_control(sd3: StableDiffusion3, tmp_path: Path, kind: str) -> None:
    """Of keyframes and windows alike, on any number of ranks: a scale of 0 is no control."""
    model: Any = sd3
    if kind == "xl":
        model = Backbone.load(write_tiny_xl(tmp_path / "model"), "cpu", "float32")
        folder = make_controlnet(tmp_path / "a", model.unet)
    else:
        folder = make_sd3_controlnet(tmp_path / "a", sd3)
    settings = Settings(steps=2, keyframe_every=2, guidance=2.0)

    def edit(editor: Editor, model: Any = model, ranks: FrameGroup | None = None) -> Tensor:
        given = model, tiny_clip(5), Prompts("a ball", "", "a box"), editor, NNField(), settings
        return edit_clip(*given, ranks=ranks).latents

    plain, before = edit(SDEdit(1.0)), backbone_state(model)
    unscaled, controlled = (edit(ControlNet(str(folder), scale=s)) for s in (0.0, 1.0))
    assert torch.allclose(unscaled, plain, rtol=0, atol=1e-6)
    assert (controlled - plain).abs().amax(dim=(1, 2, 3)).min() > 0.1
    assert backbone_state(model) == before
    models = [copy.deepcopy(model) for _ in range(2)]
    halves = on_ranks(2, lambda r: edit(ControlNet(str(folder)), models[r.rank], r))
    assert torch.allclose(torch.cat(halves), controlled, rtol=0, atol=1e-4)


def test_sd3s_of_other_numbers_of_blocks_add_up(sd3: StableDiffusion3, tmp_path: Path) -> None:
    """Where diffusers leaves out the further blocks."""
    networks = [
        load_controlnet(make_sd3_controlnet(tmp_path / str(n), sd3, num_layers=n), sd3)
        for n in (1, 2)
    ]
    told = sd3.embed(["a ball"])
    x, seen = torch.randn(2, 1, 4, 8, 8).unbind()
    blocks = [
        [float(one.sum()) for one in n.residuals(x, 500.0, told, seen, 1.0)] for n in networks
    ]
    assert [len(one) for one in blocks] == [3, 3]
    assert [len(set(one)) for one in blocks] == [1, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_channels": 8, "out_channels": 8}, r"latent channels 4 \(found 8\)"),
        ({"extra_conditioning_channels": 1}, r"of the control image 0 \(found 1\)"),
        (
            {"pos_embed_max_size": 12, "joint_attention_dim": 24},
            r"positions along a side 16 \(found 12\), width of embeddings 20 \(found 24\); choose",
        ),
    ],
)
def test_an_sd3s_of_another_transformer(
    sd3: StableDiffusion3, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = make_sd3_controlnet(tmp_path / "other", sd3, **changes)
    with pytest.raises(ModelError, match=r"other was made for another model: .*" + message):
        load_controlnet(folder, sd3)


def test_a_controlnet_of_another_family(
    folder: Path, backbone: StableDiffusion, sd3: StableDiffusion3, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=r"is a ControlNetModel, .* expected a SD3ControlNetModel"):
        load_controlnet(folder, sd3)
    other = make_sd3_controlnet(tmp_path / "sd3", sd3)
    message = r"sd3 is a SD3ControlNetModel, which is for another family: .* choose one that was"
    with pytest.raises(ModelError, match=message):
        load_controlnet(other, backbone)


def test_families_without_controlnets(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"2\.x, 3 and SDXL, got a GaussianFlow; choose such a"):
        load_controlnet(folder, GaussianFlow())
