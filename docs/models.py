"""Writes the table of model families into `docs/models.md`: `python docs/models.py`."""

from __future__ import annotations

from pathlib import Path

from tokenflow.diffusion.backbone import Backbone, families, imported, is_ours
from tokenflow.diffusion.controlnet import FITTED
from tokenflow.diffusion.single_file import LAYOUTS

PAGE = Path(__file__).with_name("models.md")
BEGIN, END = "<!-- by docs/models.py -->\n", "<!-- end -->\n"
METHODS = {
    "another VAE, `--model.vae`": "replace_vae",
    "LoRAs, `--model.loras`": "fuse",
    "learned words, `--model.embeddings`": "add_embeddings",
    "depth, or a mask for inpainting": "further_channels",
    "compiled, `--model.compile`": "compile",
}
"""Options, and the methods of a family that takes them."""


def table() -> str:
    """The families that are registered, and what each takes."""
    entries = {name: entry for name, entry in sorted(families().items()) if is_ours(entry)}
    kinds = {name: imported(entry) for name, entry in entries.items()}
    files = {pipeline for pipeline, _ in LAYOUTS}
    rows = {
        "`_class_name` in `model_index.json`": [f"`{name}`" for name in kinds],
        "parts": [", ".join(f"`{part}`" for part in parts(kind)) for kind in kinds.values()],
        "one file, `--model.backbone x.safetensors`": [yes(name in files) for name in kinds],
        "ControlNets": [yes(issubclass(kind, tuple(FITTED))) for kind in kinds.values()],
        **{
            option: [yes(getattr(kind, by) is not getattr(Backbone, by)) for kind in kinds.values()]
            for option, by in METHODS.items()
        },
        "dtype on an accelerator": [f"{kind.half}".split(".")[-1] for kind in kinds.values()],
    }
    titles = [getattr(kind, "title", kind.__name__) for kind in kinds.values()]
    lines = [["", *titles], ["---"] * (1 + len(titles)), *([k, *v] for k, v in rows.items())]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def parts(kind: type[Backbone]) -> list[str]:
    """The networks and schedules of a family's folder."""
    names = getattr(kind, "components", {})
    return [name for name in names if not name.startswith("tokenizer")]


def yes(taken: bool) -> str:
    """A cell."""
    return "yes" if taken else "no"


def page(text: str) -> str:
    """A page's text with the table as it is now."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}{table()}{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
