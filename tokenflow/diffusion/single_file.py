"""Checkpoints in one file, in the layout of the original Stable Diffusion and SDXL code.

A file has names and weights alone. Its configuration is found from their shapes, as far as these
tell it; heads, groups and noise schedule are those that all published models of a family have.
diffusers converts the weights.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import diffusers
import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import CLIPTokenizer

from tokenflow.diffusion.loading import ModelError, load_pretrained

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, OPEN_CLIP = "cond_stage_model.transformer.text_model.", "cond_stage_model.model."
CLIP_XL = "conditioner.embedders.0.transformer.text_model."
OPEN_CLIP_XL = "conditioner.embedders.1.model."
TIMES = 6
"""Numbers of an image's size that SDXL's UNet embeds."""
HEAD = 64
"""Width of a head: of all CLIP text encoders, and of the UNets of SD 2.x and SDXL."""
VOCABULARY = "openai/clip-vit-large-patch14"
"""Whose vocabulary all of them have."""
PADDING = {"quick_gelu": "<|endoftext|>", "gelu": "!"}
"""Of prompts, by the activation of OpenAI's and of OpenCLIP's text encoders."""
BETAS = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000, "steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False,
}  # fmt: skip
LAYOUTS = (
    ("StableDiffusionXLPipeline", (CLIP_XL, OPEN_CLIP_XL)),
    ("StableDiffusionPipeline", (CLIP,)),
    ("StableDiffusionPipeline", (OPEN_CLIP,)),
)
"""Pipelines, and how the names of their text encoders' weights begin."""
LACKS = (
    "{} has no weights for {} of its parameters{}; expected a whole checkpoint: fetch it again, or "
    "give the model's folder"
)
CASTS = {
    torch.float32: nn.Module.float,
    torch.float16: nn.Module.half,
    torch.bfloat16: nn.Module.bfloat16,
}
PICKLES = (b"PK", b"\x80")
"""How the files of `torch.save` begin."""


def require_single_file(file: Path) -> None:
    """Raises `ModelError` for a file that is not read as weights."""
    if file.suffix != ".safetensors":
        pickled = file.suffix in (".ckpt", ".pt", ".pth", ".bin")
        found = "may hold a pickle, which could run code" if pickled else "is none"
        raise ModelError(
            f"expected a model folder or a *.safetensors file, and {file} {found}; convert it by "
            f"safetensors.torch.save_file, or fetch the model as safetensors"
        )
    with file.open("rb") as opened:
        begin = opened.read(9)
        # a header's length, in eight bytes, may begin as a pickle does; then comes its JSON
        if begin.startswith(PICKLES) and begin[8:] != b"{":
            raise ModelError(
                f"{file} has the name of safetensors and holds a pickle, which is not read, as it "
                f"could run code; fetch the model as safetensors"
            )


@dataclass(frozen=True)
class Checkpoint:
    """Names and shapes of a file's weights, and its metadata."""

    file: Path
    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]

    @classmethod
    def read(cls, file: Path) -> Checkpoint:
        """Reads a file's header.

        Raises:
            ModelError: It is no safetensors file, or is damaged.
        """
        require_single_file(file)
        try:
            with safe_open(file, "pt") as opened:
                shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
                return cls(file, shapes, opened.metadata() or {})
        except SafetensorError as error:
            raise ModelError(
                f"{file} is no safetensors file, or is damaged: {error}; fetch it again"
            ) from error

    @cached_property
    def pipeline(self) -> str:
        """The name of diffusers' pipeline for the file's family.

        Raises:
            ModelError: The layout is another one.
        """
        for name, encoders in LAYOUTS:
            if all(prefix in self for prefix in (UNET, *encoders)):
                return name
        raise ModelError(
            f"the weights of {self.file} are of another layout: expected a whole checkpoint of "
            f"Stable Diffusion 1.x, 2.x or SDXL base, with {UNET}*, {VAE}* and text encoders "
            f"({CLIP}*, {OPEN_CLIP}*, or conditioner.embedders.0.* and .1.*), found "
            f"{self.beginning}; give the model's folder in diffusers' layout"
        )

    @property
    def beginning(self) -> str:
        """The names of a few weights."""
        return ", ".join(sorted(self.shapes)[:3]) or "none"

    def __contains__(self, prefix: str) -> bool:
        """Whether there are weights whose names begin so."""
        return any(name.startswith(prefix) for name in self.shapes)

    def count(self, prefix: str) -> int:
        """How many numbers follow a prefix in names: of layers `prefix0.`, `prefix1.`, …"""
        return sum(1 for _ in self.numbered(prefix))

    def numbered(self, prefix: str) -> Iterator[str]:
        """The prefixes `prefix0.`, `prefix1.`, … that names begin with."""
        number = 0
        while (one := f"{prefix}{number}.") in self:
            yield one
            number += 1

    def size(self, name: str, axis: int) -> int:
        """The length of a weight's axis.

        Raises:
            ModelError: There is no such weight.
        """
        try:
            return self.shapes[name][axis]
        except (KeyError, IndexError) as error:
            raise ModelError(
                f"{self.file} has no {name} of a shape that fits; expected a whole checkpoint: "
                f"fetch it again, or give the model's folder"
            ) from error

    @property
    def is_xl(self) -> bool:
        """Whether it is an SDXL."""
        return self.pipeline == "StableDiffusionXLPipeline"

    @property
    def stated_prediction(self) -> str | None:
        """What the network predicts, if the file says so."""
        if "ztsnr" in self:
            raise ModelError(
                f"{self.file} was trained with zero terminal SNR: its noisiest latents hold no "
                f"signal, and inversion cannot reach them; choose another model"
            )
        stated = self.metadata.get("modelspec.prediction_type", "v" if "v_pred" in self else None)
        return stated and ("v_prediction" if stated.startswith("v") else "epsilon")

    def unet(self) -> dict[str, Any]:
        """The configuration of diffusers' UNet."""
        levels = list(self.levels())
        depth = self.count(f"{UNET}middle_block.1.transformer_blocks.")
        depths = [level.depth or depth for level in levels]
        channels = [level.channels for level in levels]
        first = next((level.attention for level in levels if level.depth), f"{UNET}none.")
        self.size(f"{first}proj_in.weight", 1)  # refuses what has none
        linear = len(self.shapes[f"{first}proj_in.weight"]) == 2
        crossed = self.size(f"{first}transformer_blocks.0.attn2.to_k.weight", 1)
        kinds = ["CrossAttnDownBlock2D" if level.depth else "DownBlock2D" for level in levels]
        config: dict[str, Any] = {
            "sample_size": 128 if self.is_xl else 64,
            "in_channels": self.size(f"{UNET}input_blocks.0.0.weight", 1),
            "out_channels": self.size(f"{UNET}out.2.weight", 0),
            "block_out_channels": channels,
            "layers_per_block": levels[0].layers,
            "down_block_types": kinds,
            "up_block_types": [kind.replace("Down", "Up") for kind in reversed(kinds)],
            "transformer_layers_per_block": depths,
            "cross_attention_dim": crossed,
            "use_linear_projection": linear,
            # by its name a width, by its use a number of heads
            "attention_head_dim": [width // HEAD for width in channels] if linear else 8,
        }
        if f"{UNET}label_emb." in self:
            embedded = self.size(f"{UNET}label_emb.0.0.weight", 1)
            pooled = self.size(f"{OPEN_CLIP_XL}text_projection", 1)
            config["addition_embed_type"] = "text_time"
            config["addition_time_embed_dim"] = (embedded - pooled) // TIMES
            config["projection_class_embeddings_input_dim"] = embedded
        return config

    def levels(self) -> Iterator[Level]:
        """The resolutions of the UNet's encoder, the highest first."""
        channels, layers, depth, attention = 0, 0, 0, ""
        blocks = list(self.numbered(f"{UNET}input_blocks."))[1:]
        for block in blocks:
            if f"{block}0.op." in self:
                yield Level(channels, layers, depth, attention)
                layers = depth = 0
                continue
            channels = self.size(f"{block}0.out_layers.3.weight", 0)
            layers, attention = layers + 1, f"{block}1."
            depth = self.count(f"{attention}transformer_blocks.")
        yield Level(channels, layers, depth, attention)

    def vae(self, prefix: str = VAE) -> dict[str, Any]:
        """The configuration of diffusers' VAE."""
        levels = list(self.numbered(f"{prefix}encoder.down."))
        channels = [self.size(f"{level}block.0.conv2.weight", 0) for level in levels]
        return {
            "block_out_channels": channels,
            "down_block_types": ["DownEncoderBlock2D"] * len(levels),
            "up_block_types": ["UpDecoderBlock2D"] * len(levels),
            "layers_per_block": self.count(f"{prefix}encoder.down.0.block."),
            "latent_channels": self.size(f"{prefix}decoder.conv_in.weight", 1),
            "mid_block_add_attention": f"{prefix}encoder.mid.attn_1." in self,
            "use_quant_conv": f"{prefix}quant_conv." in self,
            "use_post_quant_conv": f"{prefix}post_quant_conv." in self,
        }

    def texts(self) -> dict[str, dict[str, Any]]:
        """The configurations of transformers' text encoders, by component."""
        if self.is_xl:
            second = self.open_clip(OPEN_CLIP_XL, 0)
            return {"text_encoder": self.clip(CLIP_XL), "text_encoder_2": second}
        if CLIP in self:
            return {"text_encoder": self.clip(CLIP)}
        # whose embeddings are those before the last layer
        return {"text_encoder": self.open_clip(OPEN_CLIP, 1)}

    def clip(self, prefix: str) -> dict[str, Any]:
        """Of OpenAI's CLIP."""
        layer, tables = f"{prefix}encoder.layers.", f"{prefix}embeddings."
        tokens, positions = (f"{tables}{kind}_embedding.weight" for kind in ("token", "position"))
        wide = self.size(f"{layer}0.mlp.fc1.weight", 0)
        return self.text(tokens, positions, self.count(layer), wide, "quick_gelu")

    def open_clip(self, prefix: str, unused: int) -> dict[str, Any]:
        """Of OpenCLIP, without its last layers that are not used."""
        layer = f"{prefix}transformer.resblocks."
        tokens, positions = f"{prefix}token_embedding.weight", f"{prefix}positional_embedding"
        wide = self.size(f"{layer}0.mlp.c_fc.weight", 0)
        config = self.text(tokens, positions, self.count(layer) - unused, wide, "gelu")
        projected = f"{prefix}text_projection"
        return {**config, "projection_dim": self.size(projected, 1)} if not unused else config

    def text(
        self, tokens: str, positions: str, layers: int, wide: int, activation: str
    ) -> dict[str, Any]:
        """Of a text encoder, by the names of its tables and what its layers have in common."""
        words, width = self.size(tokens, 0), self.size(tokens, 1)
        return {
            "vocab_size": words,
            "hidden_size": width,
            "max_position_embeddings": self.size(positions, 0),
            "num_hidden_layers": layers,
            "intermediate_size": wide,
            "num_attention_heads": width // HEAD,
            "hidden_act": activation,
            "bos_token_id": words - 2,
            "eos_token_id": words - 1,
        }

    def tokenizer(self, positions: int, padding: str) -> CLIPTokenizer:
        """CLIP's, from a folder tokenizer/ beside the file, or the hub's cache on this machine.

        Raises:
            ModelError: It is at neither place.
        """
        beside = self.file.parent / "tokenizer"
        where = str(beside) if beside.is_dir() else VOCABULARY
        try:
            found = CLIPTokenizer.from_pretrained(
                where, local_files_only=True, model_max_length=positions
            )
        except Exception:  # of a damaged file: a tokenizer's is a plain Exception
            found = None
        # transformers makes one without a vocabulary where there is none
        if found is None or len(found) == len(found.all_special_ids):
            raise ModelError(
                f"{self.file} has no tokenizer, as such files have none, and there is none to use: "
                f"expected a folder {beside} with tokenizer.json, or vocab.json and merges.txt, or "
                f"{VOCABULARY} in the hub's cache of this machine; copy tokenizer/ of any Stable "
                f"Diffusion 1.x or 2.x folder, or run: hf download {VOCABULARY} tokenizer.json "
                f"tokenizer_config.json vocab.json merges.txt"
            )
        if padding in found.get_vocab():
            found.pad_token = padding
        return found


@dataclass(frozen=True)
class Level:
    """One resolution of a UNet's encoder: its transformers' depth is 0 where it has none."""

    channels: int
    layers: int
    depth: int
    attention: str


def load_parts(file: str, components: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The components of a checkpoint, with a warning that says what it was taken for.

    Args:
        file: The checkpoint.
        components: Their classes.
        dtype: Of the networks.

    Raises:
        ModelError: The layout is not known; weights are missing or damaged.
    """
    found = Checkpoint.read(Path(file))
    texts = found.texts()
    configs = {"unet": found.unet(), "vae": found.vae(), **texts}
    configs["vae"]["scaling_factor"] = 0.13025 if found.is_xl else 0.18215
    stated = found.stated_prediction
    configs["scheduler"] = {**BETAS, "prediction_type": stated or "epsilon"}
    tokenizers = {
        name.replace("text_encoder", "tokenizer"): found.tokenizer(
            config["max_position_embeddings"], PADDING[config["hidden_act"]]
        )
        for name, config in texts.items()
    }
    with configured(found.pipeline, components, configs) as folder:
        pipeline = getattr(diffusers, found.pipeline)
        whole = converted(pipeline, found.file, "a network", config=folder, **tokenizers)
    parts = {name: getattr(whole, name) for name in components}
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            require_whole(part, f"{name} of {file}")
            CASTS[dtype](part)
    if stated is None and OPEN_CLIP in found:
        parts["scheduler"].register_to_config(prediction_type=predicted(parts["unet"].float()))
        CASTS[dtype](parts["unet"])
    by_v = parts["scheduler"].config.prediction_type == "v_prediction"
    warnings.warn(
        f"a file of weights does not say what it is: {file} is taken for {family_of(found)}, "
        f"predicting {'v' if by_v else 'noise'}, with the schedule of the published model",
        stacklevel=2,
    )
    return parts


def converted(kind: Any, file: Path, what: str, **options: Any) -> Any:
    """What a class of diffusers makes of a file, with errors that say what to do."""

    def load(name: str, **options: Any) -> Any:
        try:
            return kind.from_single_file(name, local_files_only=True, **options)
        except NotImplementedError as error:  # of moving what is still without a value
            raise ModelError(LACKS.format(f"the UNet or the VAE of {name}", "some", "")) from error

    return load_pretrained(load, str(file), what, "the weights", **options)


def family_of(checkpoint: Checkpoint) -> str:
    """What people call a checkpoint's family."""
    older = "Stable Diffusion 1.x" if CLIP in checkpoint else "Stable Diffusion 2.x"
    return "SDXL" if checkpoint.is_xl else older


@contextmanager
def configured(
    pipeline: str, components: Mapping[str, Any], configs: Mapping[str, Any]
) -> Iterator[str]:
    """A folder with configurations in diffusers' layout."""
    with TemporaryDirectory() as folder:
        index: dict[str, Any] = {"_class_name": pipeline}
        for name, kind in components.items():
            index[name] = [kind.__module__.partition(".")[0], kind.__name__]
            if name in configs:
                file = "scheduler_config.json" if name == "scheduler" else "config.json"
                (Path(folder) / name).mkdir()
                (Path(folder) / name / file).write_text(json.dumps(configs[name]))
        (Path(folder) / "model_index.json").write_text(json.dumps(index))
        yield folder


def require_whole(network: nn.Module, what: str) -> None:
    """Raises `ModelError` for a network with parameters that no weight was found for."""
    missing = [name for name, parameter in network.named_parameters() if parameter.is_meta]
    if missing:
        raise ModelError(LACKS.format(what, len(missing), f", such as {missing[0]}"))


@torch.no_grad()
def predicted(unet: Any) -> str:
    """Whether a UNet predicts noise or v, which SD 2.x's checkpoints do not say.

    At the last timestep the latent is nearly noise: one that predicts noise puts out its input, and
    one that predicts v the clean latent, which the input says next to nothing of.
    """
    size, width = unet.config.sample_size, unet.config.cross_attention_dim
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, unet.config.in_channels, size, size, generator=generator).to(unet.dtype)
    text = torch.zeros(1, 1, width, dtype=unet.dtype)
    output = unet(x, 999, encoder_hidden_states=text).sample
    correlation = torch.corrcoef(
        torch.stack([x[:, : output.shape[1]].flatten(), output.flatten()]).float()
    )[0, 1]
    return "epsilon" if correlation > 0.5 else "v_prediction"
