"""The contract of a frozen model family: its networks, its latents, its layers' names."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float
from torch import Tensor, nn

from tokenflow.diffusion.conditioning import Conditioning
from tokenflow.diffusion.loading import ModelError, folder_or_id, load_pretrained
from tokenflow.diffusion.lora import LoRA
from tokenflow.diffusion.schedule import Schedule, Timestep
from tokenflow.diffusion.scheduler import Timesteps
from tokenflow.diffusion.single_file import Checkpoint
from tokenflow.diffusion.sites import Site
from tokenflow.diffusion.textual_inversion import Embedding
from tokenflow.errors import InputError

MINIATURE = Path(__file__).parents[1] / "miniature"
EMBEDDED = {
    "miniature": MINIATURE / "weights",
    "miniature-lcm": MINIATURE / "lcm",
    "miniature-transformer": MINIATURE / "transformer",
}
"""Folders of the embedded models by name: a UNet, its few-step form, and a transformer."""
INDEX = "model_index.json"
GROUP = "tokenflow.backbones"
VARIANTS = {"text_encoder_2": "StableDiffusionXLPipeline", "unet": "StableDiffusionPipeline"}
"""The pipelines that others with such a part are taken for; the first that a model has counts."""
VARIANT_PARTS = {
    "unet": "UNet2DConditionModel", "text_encoder": "CLIPTextModel", "vae": "AutoencoderKL",
}  # fmt: skip
"""The classes of the parts that such pipelines have: those of others have a UNet, too."""
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
BFLOAT16_FLAGS = ("avx512_bf16", "amx_bf16")
"""Of processors on which networks are faster in bfloat16."""

Role = Literal["structure", "queries", "keys", "values"]
FurtherChannels = Literal["depth", "mask"]


@dataclass(frozen=True)
class Defaults:
    """Options of an edit that depend on the model, where the user gives none.

    The values here are the paper's, for Stable Diffusion 1 and 2.

    Attributes:
        guidance: Scale of classifier-free guidance.
        attention: PnP's injection threshold of self-attention, a share of the steps.
        features: PnP's injection threshold of features, a share of the steps.
        feature_layers: How many decoder layers take PnP's features.
    """

    guidance: float = 7.5
    attention: float = 0.5
    features: float = 0.8
    feature_layers: int = 1

    def __post_init__(self) -> None:
        shares = self.attention, self.features
        numbers = all(type(value) in (int, float) for value in (self.guidance, *shares))
        whole = type(self.feature_layers) is int and self.feature_layers >= 1
        if not (numbers and whole and all(0 <= share <= 1 for share in shares)):
            raise ModelError(
                f"a model's defaults must be numbers, attention and features from 0 to 1 and "
                f"feature_layers at least 1, got {self}"
            )

    @classmethod
    def read(cls, file: Path) -> Defaults:
        """Those in a JSON file.

        Raises:
            ModelError: The file holds something else.
        """
        try:
            return cls(**json.loads(file.read_text()))
        except (ValueError, TypeError) as error:
            names = ", ".join(field.name for field in fields(cls))
            raise ModelError(f"{file} holds something else than {names}: {error}") from error


@dataclass(frozen=True)
class Traits:
    """What a model is, as its files say without its weights.

    Attributes:
        family: Its class.
        config: Of its denoising network, as diffusers has it; empty where the family has none.
        defaults: The options of an edit that suit it; None where only the loaded model tells.
        further_channels: As `Backbone.further_channels`.
        few_steps: Whether it was distilled to 4 to 8 steps, where its scheduler says so.
    """

    family: type[Backbone]
    config: Mapping[str, Any] = field(default_factory=dict)
    defaults: Defaults | None = Defaults()
    further_channels: FurtherChannels | None = None
    few_steps: bool = False


class Backbone(ABC):
    """A frozen text-to-image model on one device.

    Subclasses are found by the pipeline that a model's `model_index.json` names in `_class_name`,
    through the entry point group `tokenflow.backbones`. Latents go in and come out in float32
    whatever the networks' dtype, so that a sampler's sums do not lose bits.
    """

    network: nn.Module
    """The denoising network: layers' names are those of its modules."""
    half: ClassVar[torch.dtype] = torch.float16
    """What dtype "auto" is on an accelerator."""
    few_steps: bool = False
    """As in `Traits`."""

    @classmethod
    def load(
        cls,
        model: str | Path,
        device: str = "auto",
        dtype: str = "auto",
        compile: bool = False,
        vae: str | None = None,
        loras: Sequence[LoRA] = (),
        embeddings: Sequence[Embedding] = (),
        timesteps: Timesteps | None = None,
    ) -> Backbone:
        """Loads a model of whichever family it belongs to.

        Args:
            model: A folder in diffusers' layout, the id of a hub model ("owner/name"), a checkpoint
                in one file (Stable Diffusion's or SDXL's own layout, *.safetensors),
                or an embedded one: "miniature", "miniature-lcm", "miniature-transformer".
            device: "auto" takes an accelerator if there is one, else the CPU.
            dtype: "float32", "float16", "bfloat16"; "auto" is float16 on an accelerator (of Flux
                bfloat16), and on a CPU bfloat16 where the processor computes in it, else float32.
            compile: Whether parts of the network are compiled, which takes seconds to minutes.
            vae: A VAE in place of the model's own: a folder, a hub id, or a *.safetensors file.
            loras: Low-rank changes of the weights, which add up.
            embeddings: Words whose embeddings were learned.
            timesteps: How sampling timesteps are spaced; as the model's scheduler says if not
                given. A checkpoint in one file and a LoRA for few steps say nothing.

        Raises:
            ModelError: The model's family is not known; a component is missing, has no
                safetensors, cannot be fetched, or does not fit the others; the network cannot be
                compiled.
            InputError: There is not enough memory.
        """
        if dtype not in ("auto", *DTYPES):
            raise ModelError(f"dtype must be one of {('auto', *DTYPES)}, got {dtype!r}")
        found = place_of(model)
        where = device if device != "auto" else default_device()
        kind = family(found)
        number = default_dtype(where, kind.half) if dtype == "auto" else DTYPES[dtype]
        backbone = kind.from_model(found, where, number)
        if vae is not None:
            backbone.replace_vae(vae)
        if loras:
            backbone.fuse(loras)
        if embeddings:
            backbone.add_embeddings(embeddings)
        if timesteps is not None:
            backbone.respace(timesteps)
        if compile:
            backbone.compile()
        return backbone

    @classmethod
    def describe(cls, model: str | Path) -> Traits:
        """What a model is, whichever family it belongs to; `model` is as in `load`.

        No weights are loaded or fetched.

        Raises:
            ModelError: The model's family is not known, or a file that says what it is is missing
                or malformed.
        """
        try:
            found = place_of(model)
            return family(found).traits_of(found)
        except InputError:
            raise
        except Exception as error:  # of what a file holds in place of what is expected
            raise ModelError(
                f"the configurations of the model {str(model)!r:.200} ({INDEX}, config.json of its "
                f"network, scheduler_config.json) do not say what it is: {type(error).__name__}: "
                f"{error!s:.200}; fetch the model again"
            ) from error

    @classmethod
    def traits_of(cls, model: str) -> Traits:
        """What a model of this family is, from a folder, a hub id, or a checkpoint in one file.

        By default its family alone.
        """
        return Traits(cls, defaults=Defaults() if cls.defaults is Backbone.defaults else None)

    @property
    def traits(self) -> Traits:
        """What this model is."""
        config = getattr(self.network, "config", {})
        return Traits(type(self), config, self.defaults, self.further_channels, self.few_steps)

    @classmethod
    @abstractmethod
    def from_model(cls, model: str, device: str, dtype: torch.dtype) -> Backbone:
        """Loads a model of this family from a folder, a hub id, or a checkpoint in one file."""

    def replace_vae(self, vae: str) -> None:
        """Takes a VAE in place of the model's own, from a folder, a hub id or a file.

        Raises:
            ModelError: It does not fit the model, or this family takes no other.
        """
        raise ModelError(f"a {type(self).__name__} takes no other VAE; leave vae out")

    def fuse(self, loras: Sequence[LoRA]) -> None:
        """Adds LoRAs to the weights of the network and the text encoders.

        Raises:
            ModelError: One does not fit the model, or this family takes none.
        """
        raise ModelError(f"a {type(self).__name__} takes no LoRAs; leave loras out")

    def add_embeddings(self, embeddings: Sequence[Embedding]) -> None:
        """Adds words whose embeddings were learned to the text encoders.

        Raises:
            ModelError: One does not fit the model, or this family takes none.
        """
        raise ModelError(f"a {type(self).__name__} takes no embeddings; leave embeddings out")

    def respace(self, timesteps: str) -> None:
        """Spaces sampling timesteps otherwise than the model's scheduler says.

        Raises:
            ModelError: There is no such spacing, or this family has one alone.
        """
        raise ModelError(f"a {type(self).__name__} has timesteps of its own; leave timesteps out")

    def compile(self) -> None:
        """Compiles parts of the network, for every batch and size; layers' names stay as they are.

        Raises:
            ModelError: They cannot be compiled.
        """
        raise ModelError(f"a {type(self).__name__} cannot be compiled; leave compile at false")

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the network is."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """In what the network computes."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """A digest of weights, configurations and vocabulary: part of every cache key."""

    @property
    @abstractmethod
    def latent_channels(self) -> int:
        """Channels of a latent."""

    @property
    @abstractmethod
    def latent_scale(self) -> int:
        """Pixels of a frame along the side of one latent pixel."""

    @property
    @abstractmethod
    def size(self) -> int:
        """Height and width, in latent pixels, of the images that the model was trained for."""

    @property
    @abstractmethod
    def multiple(self) -> int:
        """What frames' height and width must be multiples of, in pixels."""

    @property
    def largest(self) -> int | None:
        """The longest side of a frame that the network has positions for, in pixels, if any is."""
        return None

    @abstractmethod
    def schedule(self, steps: int, size: tuple[int, int] | None = None) -> Schedule:
        """The model's noise schedule with `steps` sampling steps.

        Args:
            steps: Of sampling.
            size: A latent's height and width, which some families' noise depends on; those of
                `size` when not given.

        Raises:
            InputError: The model has fewer.
        """

    @abstractmethod
    def embed(self, prompts: Sequence[str]) -> Conditioning:
        """The text encoders' output, one row per prompt.

        A guidance-distilled model, whose network embeds the scale of guidance, has it in a row
        "guidance", here 1: an edit sets its own in the edited branches, and runs without the
        negative one.
        """

    @abstractmethod
    def encode(self, frames: Float[Tensor, "n 3 height width"]) -> Float[Tensor, "n c h w"]:
        """Frames in 0..1 to latents as the network takes them, without randomness."""

    @abstractmethod
    def decode(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 height width"]:
        """Latents to frames in 0..1."""

    @abstractmethod
    def predict(
        self,
        latents: Float[Tensor, "n c h w"],
        t: Timestep,
        conditioning: Conditioning,
        **inputs: Any,
    ) -> Float[Tensor, "n c h w"]:
        """The network's output, which `Schedule.split` reads; `inputs` go to it as they are.

        `conditioning` has n rows. A model with `further_channels` is given them as `channels`
        (n, d, h, w). The result is float32, on the network's device.
        """

    @property
    def further_channels(self) -> FurtherChannels | None:
        """What the network takes of every frame beside its latents, at their size, in each pass.

        "depth" is one channel in -1..1; "mask" is 1 where the frame is to be painted, 0 elsewhere,
        and then the latents of the frame with that region in grey. None by default.
        """
        return None

    @property
    @abstractmethod
    def further_inputs(self) -> frozenset[str]:
        """The names of the inputs that `predict` passes on, such as a ControlNet's residuals."""

    @abstractmethod
    def sites(self) -> Mapping[str, Site]:
        """The attention among a frame's own tokens, by layer name, in the network's order."""

    def cross_attention(self) -> Mapping[str, Site]:
        """The attention from a frame's tokens to the prompt's, where that is a layer of its own."""
        return {}

    @abstractmethod
    def layers(self, role: Role) -> Sequence[str]:
        """The layers whose outputs editors replace, by name.

        "structure" are the residual blocks' outputs of the decoder, from the one that holds the
        picture's layout in the fewest channels upwards; "queries", "keys" and "values" the
        projections of the self-attentions from there upwards.
        """

    def entries(self, layer: str) -> Sequence[str]:
        """The modules through which a batch's rows enter what leads to a layer alone, by name.

        Where the layer's output is needed for the first rows only, these modules are given only
        those. None by default: the whole batch goes through the layer.
        """
        return ()

    def hooked(self, layer: str) -> AbstractContextManager[None]:
        """A block in which a layer's hooks are called, with the whole batch.

        Raises:
            ModelError: The layer is in one that is compiled, where no hook would be called.
        """
        return nullcontext()

    @property
    def defaults(self) -> Defaults:
        """The options of an edit that suit this model; the paper's by default."""
        return Defaults()


def place_of(model: str | Path) -> str:
    """The folder or file of a model that is named as in `Backbone.load`, or its hub id.

    Raises:
        ModelError: It can be none of these.
    """
    return folder_or_id(str(EMBEDDED.get(str(model), model)), INDEX, file=True)


def family(model: str) -> type[Backbone]:
    """The class of the backbone that a folder, a file or a hub model needs.

    What names no pipeline, or another one of the same parts, is taken for Stable Diffusion or SDXL.

    Raises:
        ModelError: No family is installed for what the model's index names.
    """
    index: dict[str, Any] = {part: ["", kind] for part, kind in VARIANT_PARTS.items()}
    if (Path(model) / "text_encoder_2").is_dir():
        index["text_encoder_2"] = []
    if Path(model).is_file():
        index = {"_class_name": Checkpoint.read(Path(model)).pipeline}
    elif not Path(model).is_dir() or (Path(model) / INDEX).exists():
        index = load_pretrained(DiffusionPipeline.load_config, model, INDEX, INDEX)
    if not isinstance(index, dict):
        raise ModelError(
            f"{INDEX} of the model {model} names no pipeline: expected a mapping with _class_name, "
            f"got a {type(index).__name__}; fetch the model again"
        )
    known = families()
    name = index.get("_class_name")
    entry = known.get(str(name))
    if entry is None and all(
        isinstance(index.get(part), list) and kind in index[part]
        for part, kind in VARIANT_PARTS.items()
    ):
        entry = next(known[kind] for part, kind in VARIANTS.items() if index.get(part) is not None)
    if entry is None:
        raise ModelError(
            f"the model {model} is a {name}, expected one of {', '.join(sorted(known))}; choose a "
            f"model of one of these families"
        )
    return imported(entry)


def families() -> dict[str, EntryPoint]:
    """The entry points of all families that are installed, by the pipelines that indices name."""
    # tokenflow's own come last: no other package replaces them
    return {entry.name: entry for entry in sorted(entry_points(group=GROUP), key=is_ours)}


def imported(entry: EntryPoint) -> type[Backbone]:
    """The class that an entry point offers.

    Raises:
        ModelError: It cannot be imported, or is no backbone.
    """
    try:
        kind = entry.load()
    except Exception as error:  # a third party's module may raise anything
        raise ModelError(
            f"the backbone {entry.value} for {entry.name} cannot be imported: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not (isinstance(kind, type) and issubclass(kind, Backbone)):
        raise ModelError(f"{entry.value}, offered for {entry.name}, is no subclass of Backbone")
    return kind


def is_ours(entry: EntryPoint) -> bool:
    """Whether an entry point is tokenflow's own."""
    return entry.dist is not None and entry.dist.name == "tokenflow"


def default_dtype(device: str, half: torch.dtype = torch.float16) -> torch.dtype:
    """`half` on an accelerator; on a CPU bfloat16 where it computes in it, else float32.

    By the processor's flags rather than by timing, so that all runs on a machine agree.
    """
    if torch.device(device).type != "cpu":
        return half
    # PyTorch before 2.11 cannot tell
    flags: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    computes = torch.backends.mkldnn.is_available() and any(map(flags.get, BFLOAT16_FLAGS))
    return torch.bfloat16 if computes else torch.float32


def default_device() -> str:
    """The accelerator's name if there is one, else "cpu"."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator.type if accelerator is not None else "cpu"
