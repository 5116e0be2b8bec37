"""The documentation site builds offline, strictly, and from no other host."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path

import nbformat
import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

from tests.conftest import ROOT
from tests.report.conftest import browser, chromium, look

__all__ = ["browser", "chromium"]  # fixtures

SPEC = importlib.util.spec_from_file_location("build", ROOT / "docs/build.py")
assert SPEC is not None
assert SPEC.loader is not None
site = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(site)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole site, with the notebook as it is committed: test_notebook runs it."""
    folder = tmp_path_factory.mktemp("site") / "site"
    site.build(folder, run_notebooks=False)
    return folder


def test_it_builds(built: Path) -> None:
    for page in ("index.html", "docs/faq.html", "examples/first_edit.html"):
        assert (built / page).exists()
    assert 'href="examples/first_edit.html"' in (built / "index.html").read_text()
    assert (built / "docs/demo.webp").exists()


def test_the_reference_has_what_packages_export(built: Path) -> None:
    page = (built / "docs/api.html").read_text()
    for name in ("engine.edit_clip", "editors.PnP", "propagation.NNField", "video.read_clip"):
        assert f'id="tokenflow.{name}"' in page, name
    assert "Scale of classifier-free guidance." in page


def test_search_works_from_a_folder(built: Path, browser: Chrome) -> None:
    browser.get((built / "docs/faq.html").as_uri())
    browser.find_element(By.CSS_SELECTOR, ".md-search__button").click()
    dialog, wait = "document.activeElement.shadowRoot", WebDriverWait(browser, 30)
    wait.until(lambda browser: browser.execute_script(f"return {dialog} !== null"))
    browser.switch_to.active_element.send_keys("miniature")
    found = f"return {dialog}.querySelectorAll('a[href*=miniature]').length"
    wait.until(lambda browser: browser.execute_script(found) > 0)


def test_no_word_of_a_table_breaks_on_a_phone(built: Path, browser: Chrome) -> None:
    """Each word is in one line: it has one box."""
    look(browser, width=390)
    broken = """
        const broken = [], range = document.createRange();
        for (const cell of document.querySelectorAll("table :is(th, td)")) {
          const texts = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT);
          for (let text; (text = texts.nextNode()); )
            for (const word of text.data.matchAll(/[\\p{L}\\d_]+/gu)) {
              range.setStart(text, word.index);
              range.setEnd(text, word.index + word[0].length);
              if (range.getClientRects().length > 1) broken.push(word[0]);
            }
        }
        return broken;"""
    for page in ("docs/metrics.html", "docs/choosing.html", "docs/cluster.html", "index.html"):
        browser.get((built / page).as_uri())
        assert browser.execute_script(broken) == [], page
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 390, page


def test_a_notebook_becomes_a_page_with_what_it_shows(tmp_path: Path) -> None:
    picture = "from PIL import Image\nprint(6 * 7)\nImage.new('RGB', (2, 2))"
    cells = [nbformat.v4.new_markdown_cell("# A try"), nbformat.v4.new_code_cell(picture)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "try.ipynb")
    site.write_notebook(tmp_path / "try.ipynb", tmp_path / "pages/try.ipynb", True)
    page = (tmp_path / "pages/try.md").read_text()
    assert "# A try" in page
    assert "print(6 * 7)" in page
    assert "\n    42\n" in page
    assert len(list(tmp_path.glob("pages/*.png"))) == 1


@pytest.mark.parametrize(
    ("remote", "url"),
    [
        ("git@host.org:a/b.git", "https://host.org/a/b"),
        ("https://user:word@host.org/a/b.git", "https://host.org/a/b"),
        ("ssh://git@host.org/a/b", "https://host.org/a/b"),
        ("/a/folder", ""),
        (None, ""),
    ],
)
def test_the_repositorys_address(tmp_path: Path, remote: str | None, url: str) -> None:
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    if remote:
        subprocess.run(["git", "-C", tmp_path, "remote", "add", "origin", remote], check=True)
    assert site.repository(tmp_path) == url


@pytest.mark.parametrize(
    ("page", "text", "said"),
    [
        ("new.md", "# New", "docs/new.md is not in the navigation"),
        ("faq.md", "[a](nowhere.md)", "page does not exist"),
        ("faq.md", "[a](#nowhere)", "anchor does not exist"),
        ("faq.md", "![a](nowhere.png)", "docs/faq.html refers to nowhere.png"),
        ("faq.md", '<script src="//x.org/a.js"></script>', "loads //x.org/a.js"),
        ("faq.md", "![a](https://x.org/a.png)", "loads https://x.org/a.png"),
        ("faq.md", '<source srcset="nowhere.webp">', "refers to nowhere.webp"),
    ],
)
def test_what_it_refuses(tmp_path: Path, page: str, text: str, said: str) -> None:
    docs = tmp_path / "root/docs"
    docs.mkdir(parents=True)
    head, _, tail = (ROOT / "docs/zensical.toml").read_text().partition("nav = [")
    nav = 'nav = [{ "FAQ" = "docs/faq.md" }]'
    (docs / "zensical.toml").write_text(head + nav + tail.partition("\n]")[2])
    (docs / "faq.md").write_text("# FAQ")
    for file in ("site.css", "iframe-worker.js"):
        (docs / file).write_bytes((ROOT / "docs" / file).read_bytes())
    (docs / page).write_text(text)
    with pytest.raises(SystemExit, match=said):
        site.build(tmp_path / "site", tmp_path / "root")
    assert not (tmp_path / "site").exists()
