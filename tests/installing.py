"""Distributions that are installed for one test: a folder on the path, as pip leaves it."""

from __future__ import annotations

from pathlib import Path


def install(folder: Path, name: str, entry_points: str, version: str = "1.0") -> None:
    """Writes what pip would into a folder that is on the path; modules are put beside it."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(entry_points)
