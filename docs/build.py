"""Builds the documentation site, offline and strictly: `python docs/build.py`.

Pages are laid out as in the repository, so that one link serves both. Warnings are errors; so are
pages that the navigation lacks, links to files that are not there, and anything that a page would
load from another host. The pages and their search work from a folder, without a server.

Notebooks are run and become pages with what their cells print and show. The reference of
`docs/api.md` is made from the docstrings. Where git has a remote `origin`, the navigation links it.
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

import nbformat
from nbclient import NotebookClient
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[1]
PAGES = ("*.md", "docs/*.md", "examples/*/*.md", "training/*.md")
NOTEBOOKS = "examples/*.ipynb"
KINDS = ("css", "js", "png", "svg", "webp")
LINKED = (
    "LICENSE",
    "CITATION.cff",
    "tokenflow/engine/algorithm.py",
    "tests/plugins_by_others/*.py",
)
FILES = (*LINKED, *(f"docs/*.{kind}" for kind in KINDS))


def build(folder: Path, root: Path = ROOT, *, run_notebooks: bool = True) -> None:
    """Writes the site to `folder`, in place of what is there.

    Raises:
        SystemExit: Something is wrong with a page; the message says what.
    """
    with TemporaryDirectory() as temporary:
        stage = Path(temporary)
        for file in (file for pattern in (*PAGES, *FILES) for file in root.glob(pattern)):
            target = stage / "pages" / file.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            if file.suffix == ".md":
                # a notebook is linked as the repository has it, and becomes a page
                target.write_text(file.read_text().replace(".ipynb)", ".md)"))
            else:
                shutil.copy(file, target)
        for file in root.glob(NOTEBOOKS):
            write_notebook(file, stage / "pages" / file.relative_to(root), run_notebooks)
        settings = (root / "docs/zensical.toml").read_text()
        if url := repository(root):
            settings = settings.replace("\n]", f'\n  {{ "Source code" = "{url}" }},\n]', 1)
        (stage / "zensical.toml").write_text(settings)
        (stage / "tokenflow").symlink_to(root / "tokenflow")  # where the docstrings are read
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


def write_notebook(file: Path, target: Path, run: bool) -> None:
    """Writes a notebook as a page, `target` with the suffix .md, and its pictures beside it."""
    notebook = nbformat.read(file, as_version=4)
    if run:
        NotebookClient(notebook, resources={"metadata": {"path": str(file.parent)}}).execute()
    page, resources = MarkdownExporter().from_notebook_node(notebook)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.with_suffix(".md").write_text(page)
    for name, content in resources["outputs"].items():
        (target.parent / name).write_bytes(content)


def repository(root: Path) -> str:
    """The address of git's remote `origin` for a browser, empty where there is none."""
    command = ["git", "-C", str(root), "remote", "get-url", "origin"]
    remote = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    match = re.fullmatch(r"(?:https://|ssh://)?(?:[^@/]*@)?([\w.-]+)[:/](.+?)(?:\.git)?", remote)
    return f"https://{match[1]}/{match[2]}" if match else ""


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
            if name in ("href", "src", "srcset") and value:
                self.found.append((value, name != "href" or tag == "link"))


if __name__ == "__main__":
    build(ROOT / "site")
