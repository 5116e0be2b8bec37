"""Folders and hub ids to networks: safetensors only, with errors that say what to do."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from huggingface_hub import hf_hub_download
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME

from tokenflow.errors import InputError
from tokenflow.memory import ran_out
from tokenflow.storage.paths import local

VARIANTS = ("", ".fp32", ".fp16", ".bf16")
"""What may stand before the suffix of a file of weights, the best first."""


class ModelError(InputError):
    """A model that cannot be loaded, with what was expected, what came and what to do."""


def folder_or_id(model: str, holds: str, file: bool = False) -> str:
    """The folder, ~ expanded, or the hub id; `holds` names a file that the folder has.

    Hub ids are "name" or "owner/name"; whatever else is no folder was meant to be one. Where a
    `file` of weights may take a folder's place, its path is returned as well.

    Raises:
        ModelError: It can be neither.
    """
    path = local(model)
    looks_like_path = model.startswith((".", "/", "~")) or model.count("/") > 1
    looks_like_path |= "\\" in model or "\0" in model
    if not model.strip():
        found = "none was given"
    elif path.is_file() and file:
        return str(path)
    elif path.is_file():
        found = f"{model!r} is a file"
    elif not path.is_dir() and looks_like_path:
        found = f"{model!r} does not exist"
    else:
        return str(path) if path.is_dir() else model
    raise ModelError(
        f"expected a model folder{' or a *.safetensors file' if file else ''}, but {found}; give "
        f"the folder that holds {holds}, or a hub id like 'owner/name'"
    )


def weights_file(model: str, what: str, usual: str) -> Path:
    """A file of weights, which may be in a folder or on the hub.

    Args:
        model: The file, a folder with one, or "owner/name", with a file's name behind it where it
            is not the usual one: "owner/name/file.safetensors".
        what: What errors call it, like "the LoRA".
        usual: The name that it has in a folder with others, and on the hub.

    Raises:
        ModelError: There is none, or several; it cannot be fetched.
    """
    path = local(model)
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        chosen = [file for file in files if file.name == usual] or files
        if len(chosen) != 1:
            names = ", ".join(file.name for file in files) or "none"
            raise ModelError(
                f"expected one *.safetensors file or {usual} in the folder of {what}, {path}, "
                f"found {names}; give the file's own path"
            )
        return chosen[0]
    owner, _, rest = model.partition("/")
    name, _, file = rest.partition("/")
    repository = f"{owner}/{name}"
    if path.is_file() or not (file.endswith(".safetensors") and owner.strip("~.")):
        repository, file = folder_or_id(model, usual, file=True), usual
    if path.is_file():
        return path
    what = f"{what} {model} (no file or folder here, and so on the hub {file})"
    return Path(load_pretrained(hf_hub_download, repository, what, usual, filename=file))


def require_safetensors(folder: Path) -> None:
    """Raises `ModelError` for a network's folder without weights that may be read."""
    if not any(folder.glob("*.safetensors")):
        found = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".ckpt"))
        raise ModelError(
            f"{folder} has no *.safetensors file (found {found or 'no weights'}); pickled "
            f"weights are not read: convert them with diffusers' "
            f"save_pretrained(..., safe_serialization=True)"
        )
    for index in folder.glob("*.index*.json"):  # a variant's, too
        # libraries unpickle whatever shard has another suffix
        try:
            named = set(json.loads(index.read_text()).get("weight_map", {}).values())
        except (ValueError, AttributeError, TypeError) as error:
            raise ModelError(
                f"{index} is no index of weights: expected JSON with a weight_map of file names, "
                f"got {error}; fetch the model again"
            ) from error
        if other := sorted(name for name in named if not str(name).endswith(".safetensors")):
            raise ModelError(
                f"{index} names {other[0]!r}, expected *.safetensors files only; pickled weights "
                f"are not read"
            )


def variant_of(kind: Any, folder: Path) -> str | None:
    """What stands in the names of a folder's weights: nothing if it has plain ones, or "fp16".

    Other files beside them, as a LoRA, are left alone.

    Args:
        kind: A class of diffusers or transformers.
        folder: Whose weights it is to read, with safetensors of some name.

    Raises:
        ModelError: None of them has the name of weights.
    """
    file = SAFE_WEIGHTS_NAME if issubclass(kind, PreTrainedModel) else SAFETENSORS_WEIGHTS_NAME
    stem, suffix = file.split(".")
    names = {path.name for path in folder.iterdir() if path.is_file()}
    for variant in VARIANTS:
        if names & {f"{stem}{variant}.{suffix}", f"{stem}.{suffix}.index{variant}.json"}:
            return variant.removeprefix(".") or None
    found = sorted(name for name in names if name.endswith(suffix))
    taken = ", ".join(f"{stem}{variant}.{suffix}" for variant in VARIANTS)
    raise ModelError(
        f"{folder} has no weights of a name that is read: expected {taken}, or the index of one in "
        f"parts, found {', '.join(found)}; rename the one that holds the network, or fetch it again"
    )


def load_pretrained(
    load: Callable[..., Any], model: str, what: str, holds: str, **options: Any
) -> Any:
    """`load(model, ...)`, with errors that say what to do.

    Args:
        load: `from_pretrained` of a class of diffusers or transformers.
        model: A folder, a file or a hub id.
        what: What errors call it, like "unet".
        holds: A file that the model's folder has.
        options: Further arguments of `load`.

    Raises:
        ModelError: It cannot be fetched, is damaged, or lacks weights.
    """
    try:
        part = load(model, **options)
    except Exception as error:  # of a damaged file: a tokenizer's is a plain Exception
        if isinstance(error, ModelError) or ran_out(error):
            raise
        if Path(model).exists():
            kind = "folder" if Path(model).is_dir() else "file"
            raise ModelError(
                f"{what} of the model {kind} {model} does not load: {error}"
            ) from error
        if "does not appear to have a file" in str(error) and ".safetensors" in str(error):
            raise ModelError(
                f"{what} of the hub model {model!r} has no safetensors, and pickled weights are "
                f"not read; choose one that has them, or download it, convert it with diffusers' "
                f"save_pretrained(..., safe_serialization=True), and give its folder. The hub "
                f"said: {error}"
            ) from error
        raise ModelError(
            f"{what} of the hub model {model!r} could not be fetched. Without network, download "
            f"the model elsewhere and give its folder (the one that holds {holds}) "
            f"in place of the id. The hub said: {error}"
        ) from error
    return part


def whole(kind: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration that was read, with the defaults of a class of diffusers filled in."""
    arguments = signature(kind.__init__).parameters.items()
    return {k: a.default for k, a in arguments if a.default is not Parameter.empty} | dict(config)


def load_network(kind: Any, model: str, what: str, holds: str, **options: Any) -> Any:
    """As `load_pretrained`, for what has weights: every parameter must have come from the file."""
    folder = Path(model) / options.get("subfolder", "")
    network, loading = load_pretrained(
        kind.from_pretrained, model, what, holds, use_safetensors=True, output_loading_info=True,
        variant=variant_of(kind, folder) if folder.is_dir() else None, **options,
    )  # fmt: skip
    if missing := sorted(loading["missing_keys"]):
        raise ModelError(
            f"{what} of the model {model} has no weights for {len(missing)} of its parameters, "
            f"such as {missing[0]}; its configuration and its weights do not belong together"
        )
    return network
