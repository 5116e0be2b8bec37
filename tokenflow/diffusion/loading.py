"""Folders and hub ids to networks: safetensors only, with errors that say what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenflow.errors import InputError


class ModelError(InputError):
    """A model that cannot be loaded, with what was expected, what came and what to do."""


def require_folder_or_id(model: str, holds: str) -> None:
    """Raises `ModelError` for what can be neither; `holds` names a file that the folder has.

    Hub ids are "name" or "owner/name"; whatever else is no folder was meant to be one.
    """
    looks_like_path = model.startswith((".", "/", "~")) or model.count("/") > 1 or "\\" in model
    if not model.strip():
        found = "none was given"
    elif Path(model).is_file():
        found = f"{model!r} is a file"
    elif not Path(model).is_dir() and looks_like_path:
        found = f"{model!r} does not exist"
    else:
        return
    raise ModelError(
        f"expected a model folder, but {found}; give the folder that holds {holds}, or a hub id "
        f"like 'owner/name'"
    )


def require_safetensors(folder: Path) -> None:
    """Raises `ModelError` for a network's folder without weights that may be read."""
    if not any(folder.glob("*.safetensors")):
        found = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".ckpt"))
        raise ModelError(
            f"{folder} has no *.safetensors file (found {found or 'no weights'}); pickled "
            f"weights are not read: convert them with diffusers' "
            f"save_pretrained(..., safe_serialization=True)"
        )
    for index in folder.glob("*.index.json"):
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


def load_pretrained(kind: Any, model: str, what: str, holds: str, **options: Any) -> Any:
    """`kind.from_pretrained(model, ...)`, with errors that say what to do.

    Args:
        kind: A class of diffusers or transformers.
        model: A folder or a hub id.
        what: What errors call it, like "unet".
        holds: A file that the model's folder has.
        options: Further arguments of `from_pretrained`.

    Raises:
        ModelError: It cannot be fetched, is damaged, or lacks weights.
    """
    try:
        part = kind.from_pretrained(model, **options)
    except Exception as error:  # of a damaged file: a tokenizer's is a plain Exception
        if Path(model).is_dir():
            raise ModelError(
                f"{what} of the model folder {model} does not load: {error}"
            ) from error
        raise ModelError(
            f"{what} of the hub model {model!r} could not be fetched. Without network, download "
            f"the model elsewhere and give its folder (the one that holds {holds}) "
            f"in place of the id. The hub said: {error}"
        ) from error
    return part


def load_network(kind: Any, model: str, what: str, holds: str, **options: Any) -> Any:
    """As `load_pretrained`, for what has weights: every parameter must have come from the file."""
    network, loading = load_pretrained(
        kind, model, what, holds, use_safetensors=True, output_loading_info=True, **options
    )
    if missing := sorted(loading["missing_keys"]):
        raise ModelError(
            f"{what} of the model {model} has no weights for {len(missing)} of its parameters, "
            f"such as {missing[0]}; its configuration and its weights do not belong together"
        )
    return network
