"""The documentation site builds offline, strictly, and from no other host."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.conftest import ROOT

SPEC = importlib.util.spec_from_file_location("build", ROOT / "docs/build.py")
assert SPEC is not None
assert SPEC.loader is not None
site = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(site)


def test_it_builds(tmp_path: Path) -> None:
    site.build(tmp_path / "site")
    for page in ("index.html", "docs/faq.html", "training/index.html"):
        assert (tmp_path / "site" / page).exists()
    assert (tmp_path / "site/docs/demo.png").exists()


@pytest.mark.parametrize(
    ("page", "text", "said"),
    [
        ("new.md", "# New", "docs/new.md is not in the navigation"),
        ("faq.md", "[a](nowhere.md)", "page does not exist"),
        ("faq.md", "[a](#nowhere)", "anchor does not exist"),
        ("faq.md", "![a](nowhere.png)", "docs/faq.html refers to nowhere.png"),
        ("faq.md", '<script src="//x.org/a.js"></script>', "loads //x.org/a.js"),
        ("faq.md", "![a](https://x.org/a.png)", "loads https://x.org/a.png"),
    ],
)
def test_what_it_refuses(tmp_path: Path, page: str, text: str, said: str) -> None:
    docs = tmp_path / "root/docs"
    docs.mkdir(parents=True)
    head, _, tail = (ROOT / "docs/zensical.toml").read_text().partition("nav = [")
    nav = 'nav = [{ "FAQ" = "docs/faq.md" }]'
    (docs / "zensical.toml").write_text(head + nav + tail.partition("\n]")[2])
    (docs / "faq.md").write_text("# FAQ")
    (docs / page).write_text(text)
    with pytest.raises(SystemExit, match=said):
        site.build(tmp_path / "site", tmp_path / "root")
    assert not (tmp_path / "site").exists()
