"""Builds the documentation site, offline and strictly: `python docs/build.py`.

Pages are laid out as in the repository, so that one link serves both. Warnings are errors; so are
pages that the navigation lacks, links to files that are not there, and anything that a page would
load from another host. The pages open from their folder; searching them needs a server, as
`python -m http.server --directory site`.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).parents[1]
PAGES = ("*.md", "docs/*.md", "examples/*/*.md", "training/*.md")
FILES = ("LICENSE", "docs/*.png", "examples/*.ipynb")


def build(folder: Path, root: Path = ROOT) -> None:
    """Writes the site to `folder`, in place of what is there.

    Raises:
        SystemExit: Something is wrong with a page; the message says what.
    """
    with TemporaryDirectory() as temporary:
        stage = Path(temporary)
        for file in (file for pattern in (*PAGES, *FILES) for file in root.glob(pattern)):
            target = stage / "pages" / file.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
        shutil.copy(root / "docs/zensical.toml", stage)
        stop_if(outside_navigation(stage))
        command = [sys.executable, "-m", "zensical", "build", "--strict"]
        done = subprocess.run(command, cwd=stage, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(re.sub(r"\x1b\[[\d;]*m", "", done.stdout + done.stderr))
        stop_if(bad_references(stage / "site"))
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(stage / "site", folder)


def stop_if(wrong: list[str]) -> None:
    """Stops with what is wrong, if anything is."""
    if wrong:
        raise SystemExit("\n".join(wrong))


def outside_navigation(stage: Path) -> list[str]:
    """What is wrong between the pages and the navigation of `zensical.toml`."""
    listed = re.findall(r'"([^"]+\.md)"', (stage / "zensical.toml").read_text())
    there = [str(page.relative_to(stage / "pages")) for page in stage.glob("pages/**/*.md")]
    return [
        *(
            f"{page} is not in the navigation of docs/zensical.toml"
            for page in {*there} - {*listed}
        ),
        *(f"docs/zensical.toml lists {page}, which is no page" for page in {*listed} - {*there}),
    ]


def bad_references(site: Path) -> list[str]:
    """What the site's pages and styles load from other hosts, and links to what is not there."""
    wrong = []
    for page in site.rglob("*.html"):
        references = References()
        references.feed(page.read_text())
        for link, loaded in references.found:
            parts = urlsplit(link)
            if parts.netloc and loaded:
                wrong.append(f"{page.relative_to(site)} loads {link}")
            if parts.scheme or parts.netloc or not parts.path:
                continue
            target = site / parts.path[1:] if link[0] == "/" else page.parent / parts.path
            if not Path(unquote(str(target))).exists():
                wrong.append(f"{page.relative_to(site)} refers to {link}, which is not there")
    for style in site.rglob("*.css"):
        loads = re.findall(r"(?:@import\s*|url\()['\"]?((?:https?:)?//[^'\")]+)", style.read_text())
        wrong += [f"{style.relative_to(site)} loads {link}" for link in loads]
    return wrong


class References(HTMLParser):
    """Collects a page's links, and whether the page loads what they name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, bool]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.found.append((value, name == "src" or tag == "link"))


if __name__ == "__main__":
    build(ROOT / "site")
