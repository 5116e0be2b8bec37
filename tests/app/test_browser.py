"""The page in a real browser: an edit from the upload to the video and what repeats it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import yaml
from PIL import Image
from selenium.webdriver import ActionChains, Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

from tests.app.conftest import SIDE, Served
from tests.report.conftest import chromium, look
from tokenflow.app.edits import Device
from tokenflow.app.edits import Edit as Running
from tokenflow.app.request import Requests
from tokenflow.cli.main import main
from tokenflow.runs.files import EDITED, FEATURES, RECORD, REPORT
from tokenflow.video import count_frames

__all__ = ["chromium"]  # a fixture

SOURCE, EDIT = "a plain blue ball on grass", "a plain purple ball on sand"
SCRIPT = "<img src=x onerror=alert(1)>${alert(2)}"
WATCH = """
window.seen = {states: [], previews: []};
new MutationObserver(() => {
  const state = document.querySelector("#state");
  const image = state.querySelector("img");
  if (image && !seen.previews.includes(image.src)) seen.previews.push(image.src);
  if (!seen.states.includes(state.innerText)) seen.states.push(state.innerText);
}).observe(document.querySelector("#state"), {childList: true, subtree: true, attributes: true});
"""
LOADED = "return performance.getEntriesByType('resource').map(one => one.name)"
WIDTH = "return [document.documentElement.scrollWidth, innerWidth]"


class Page:
    """The page as a person uses it."""

    def __init__(self, browser: Chrome, served: Served) -> None:
        self.browser, self.wait = browser, WebDriverWait(browser, 20, poll_frequency=0.05)
        browser.get("about:blank")
        browser.get_log("browser")  # of the page that is left: its requests are aborted
        browser.get(served.url)
        self.wait.until(lambda _: self.all("#steps input"))

    def all(self, place: str) -> list[Any]:
        return self.browser.find_elements(By.CSS_SELECTOR, place)

    def until(self, found: Callable[[], Any]) -> Any:
        return self.wait.until(
            lambda _: found(), self.browser.find_element(By.TAG_NAME, "body").text
        )

    def write(self, place: str, text: str) -> None:
        (field,) = self.all(place)
        field.clear()
        field.send_keys(text + "\t")

    def click(self, place: str) -> None:
        """By a script, as a page of this height scrolls while it is used."""
        self.browser.execute_script("arguments[0].click()", self.all(place)[0])

    def text(self, place: str) -> str:
        return str(self.all(place)[0].text)

    def prepare(self, video: Path, steps: int = 6, prompt: str = EDIT) -> None:
        """Uploads a clip and fills in what an edit needs."""
        self.all("#video input[type=file]")[0].send_keys(str(video))
        self.until(lambda: self.all("#strip img"))
        self.write("#source-prompt textarea", SOURCE)
        self.write("#prompt textarea", prompt)
        self.write("#steps input[type=number]", str(steps))
        self.until(lambda: self.steps == str(steps))
        self.browser.execute_script(WATCH)

    def choose_model(self, name: str) -> None:
        self.all("#model input")[0].click()
        self.all(f"[role=option][aria-label={name}]")[0].click()

    def edit(self, ends: str = "Done") -> None:
        """Edits, and waits for how it ends."""
        self.click("#edit")
        self.until(lambda: ends in self.text("#state"))

    @property
    def steps(self) -> Any:
        """What the field of the steps says."""
        return self.all("#steps input[type=number]")[0].get_attribute("value")

    @property
    def seen(self) -> dict[str, list[str]]:
        """The states and previews that the page has shown."""
        return self.browser.execute_script("return window.seen")  # type: ignore[no-any-return]


NOT_OURS = (
    "Method not implemented.",
    "Automatic fallback to software WebGL has been deprecated.",
    "GPU stall due to ReadPixels",
    ' "    at ',
)
"""What Gradio says at the end of every upload, a browser without GPU, and a canvas's old calls."""


def said(browser: Chrome) -> list[Any]:
    """What is on the console, without `NOT_OURS`."""
    log = browser.get_log("browser")  # type: ignore[no-untyped-call]
    return [one for one in log if not any(part in one["message"] for part in NOT_OURS)]


@pytest.fixture
def page(chromium: Chrome, served: Served) -> Iterator[Page]:
    """The page, opened anew; afterwards nothing is on the console."""
    look(chromium)
    yield Page(chromium, served)
    assert said(chromium) == []


@pytest.fixture(scope="module")
def done(chromium: Chrome, served: Served, video: Path) -> tuple[Page, dict[str, list[str]]]:
    """An edit that has ended; what the page has shown, and the page."""
    look(chromium)
    page = Page(chromium, served)
    page.prepare(video)
    page.edit()
    page.until(lambda: page.all("#result video"))
    return page, page.seen


def test_an_edit(done: tuple[Page, dict[str, list[str]]], served: Served) -> None:
    page, seen = done
    assert len(seen["previews"]) > 1, "the preview changes"
    assert any("Inverting the source: step" in state for state in seen["states"])
    assert any("Editing: step" in state and "ETA" in state for state in seen["states"])
    playing = "return document.querySelector('#result video').readyState >= 2"
    page.until(lambda: page.browser.execute_script(playing))
    assert page.all("#result-details .tf-links img"), "the correspondence"
    assert all((served.folder / "clip" / name).exists() for name in (EDITED, RECORD, REPORT))
    assert (served.folder / "clip" / FEATURES).exists()
    loaded = page.browser.execute_script(LOADED)
    assert [one for one in loaded if not one.startswith((served.url, "data:", "blob:"))] == []
    assert served.asked == [], "no request leaves the machine"
    assert said(page.browser) == []


def test_its_download_is_the_runs(done: tuple[Page, Any], served: Served, tmp_path: Path) -> None:
    page, _ = done
    allowed = {"behavior": "allow", "downloadPath": str(tmp_path)}
    page.browser.execute_cdp_cmd("Browser.setDownloadBehavior", allowed)
    page.click("#result-download")
    page.until((tmp_path / EDITED).exists)
    assert (tmp_path / EDITED).read_bytes() == (served.folder / "clip" / EDITED).read_bytes()


def test_its_yaml_and_command_repeat_it(
    done: tuple[Page, Any], served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page, _ = done
    edited = (served.folder / "clip" / EDITED).read_bytes()
    page.click("#result .label-wrap")
    lines = page.until(lambda: page.all("#result-yaml .cm-line"))
    file = tmp_path / "edit.yaml"
    file.write_text("\n".join(line.get_property("textContent") for line in lines))
    (command,) = page.all("#result-command textarea")
    words = command.get_attribute("value").split()[:2]
    assert words == ["tokenflow", "predict"]
    assert yaml.safe_load(file.read_text())["model"]["prompt"] == EDIT
    monkeypatch.delenv("TOKENFLOW_PREDICT__MODEL__CACHE")
    main(["predict", "--config", str(file), "--output.folder", str(tmp_path / "again")])
    assert (tmp_path / "again" / "clip" / EDITED).read_bytes() == edited


def test_another_prompt_takes_inversion_and_source_from_the_cache(
    page: Page, done: Any, served: Served, video: Path
) -> None:
    page.prepare(video, prompt="a plain red ball on sand")
    page.edit()
    assert not any("Inverting" in state for state in page.seen["states"])
    record = yaml.safe_load((served.folder / "clip-2" / RECORD).read_text())["run"]
    assert "invert" not in record["seconds"]


def test_the_gallery_compares_and_begins_again(page: Page, done: Any, served: Served) -> None:
    page.click("button[role=tab]:nth-of-type(2)")
    page.until(lambda: page.all("#cards figure"))
    assert EDIT in page.text("#cards")
    page.until(lambda: page.all("#single video"))
    for name in ("#other", "[role=option][aria-label=clip]"):
        (page.all(f"{name} input") or page.all(name))[0].click()
    page.until(lambda: page.all("#compared iframe"))
    page.browser.switch_to.frame(page.all("#compared iframe")[0])
    page.until(lambda: "Settings that differ" in page.text("body"))
    page.browser.switch_to.default_content()
    page.click("#again")
    page.until(lambda: page.all("#prompt textarea")[0].get_attribute("value"))
    page.until(lambda: page.all("#strip img"))
    assert page.steps == "6"
    assert page.all("#prompt textarea")[0].get_attribute("value") == "a plain red ball on sand"


def test_stop(page: Page, video: Path) -> None:
    page.prepare(video, steps=40, prompt=SCRIPT)
    page.click("#edit")
    page.until(lambda: "Editing" in page.text("#state"))
    page.click("#stop")
    page.until(lambda: "Stopped" in page.text("#state"))
    assert "goes on from there" in page.text("#state")


def test_a_mask_is_drawn(
    page: Page, done: Any, served: Served, video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """White where the mouse was and black elsewhere; a run's comes back, for that clip alone."""
    masks = list[Any]()

    def mask(self: Device, edit: Running) -> None:
        masks.append(edit.configuration["model"].get("mask"))

    monkeypatch.setattr(Device, "edit", mask)
    page.prepare(video)
    for place in ("#more > .label-wrap", "#part > .label-wrap", "#draw"):
        page.click(place)
    canvas = page.until(lambda: page.all("#mask canvas"))[0]
    page.until(lambda: re.search(r"\d{3}%", page.text("#mask")))  # the frame is there, enlarged
    page.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    mouse = ActionChains(page.browser).move_to_element(canvas).click_and_hold()
    mouse.move_by_offset(40, 0).release().perform()
    page.edit()
    drawn = Image.open(masks[0])
    assert drawn.size == (SIDE, SIDE)
    assert drawn.crop((16, 16, 20, 17)).getextrema() == (255, 255), "right of the middle"
    drawn.paste(0, (12, 12, 26, 21))
    assert drawn.getbbox() is None, "black elsewhere"
    record = served.folder / "clip" / RECORD
    whole = record.read_text()
    try:
        assert said(page.browser) == []
        record.write_text(whole.replace("mask: null\n  depth", f"mask: {masks[0]}\n  depth"))
        Page(page.browser, served).click("button[role=tab]:nth-of-type(2)")
        page.until(lambda: page.all("#single video"))
        page.click("#again")
        page.until(lambda: page.all("#strip img"))
        page.edit()
    finally:
        record.write_text(whole)
    shown = page.all("#strip img")[0].get_attribute("src")
    page.click("#bundled")
    page.until(lambda: page.all("#strip img")[0].get_attribute("src") != shown)
    page.click("#edit")
    page.until(lambda: len(masks) == 3)
    assert masks[1:] == [masks[0], None]


def test_the_options_are_those_of_the_chosen_editor(page: Page) -> None:
    layout, change = "editor.PnP.features", "editor.SDEdit.strength"

    def shown(name: str) -> bool:
        return any(one.is_displayed() for one in page.browser.find_elements(By.ID, name))

    assert (shown(layout), shown(change)) == (True, False)
    page.all("#editor input")[0].click()
    page.all("[role=option][aria-label=SDEdit]")[0].click()
    page.until(lambda: shown(change) and not shown(layout))
    assert page.steps == "40", "the most"
    page.choose_model("miniature-lcm")
    page.until(lambda: page.steps == "8" and "Made for few steps" in page.text("#notes"))
    assert page.all("#editor input")[0].get_attribute("value") == "SDEdit", "as it fits"


def test_what_is_typed_while_the_server_answers_stays(
    page: Page, video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tab through the field of the model asks nothing; a chosen one changes nothing typed."""
    asked, answers = list[str](), Event()
    traits = Requests.traits

    def waits(self: Requests, model: str) -> Any:
        asked.append(model)
        assert answers.wait(60)
        return traits(self, model)

    def counts(path: Path) -> int:
        assert answers.wait(60)
        return count_frames(path)

    monkeypatch.setattr(Requests, "traits", waits)
    monkeypatch.setattr("tokenflow.app.page.count_frames", counts)
    page.all("#video input[type=file]")[0].send_keys(str(video))
    page.write("#prompt textarea", EDIT)  # and on to the model
    page.write("#frames input[type=number]", "3")  # of 5, and before that 8
    page.choose_model("miniature-lcm")
    page.until(lambda: asked)
    page.write("#guidance input", "5")
    assert asked == ["miniature-lcm"]
    answers.set()
    page.until(lambda: page.steps == "8" and len(page.all("#strip img")) == 3)
    values = [
        page.all(f"{one} input")[0].get_attribute("value") for one in ("#guidance", "#frames")
    ]
    assert values == ["5", "3"]


def test_an_edit_that_fails_says_why(page: Page, video: Path) -> None:
    page.edit(ends="there is no video; upload one")
    page.prepare(video, prompt="")
    page.edit(ends="the prompt is empty; say what the edited video shows")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone(page: Page, done: Any, scheme: str) -> None:
    look(page.browser, 390, scheme)
    for number, shown in ((1, "#video"), (2, "#single video")):
        page.click(f"button[role=tab]:nth-of-type({number})")
        page.until(lambda shown=shown: page.all(shown))
        width, window = page.browser.execute_script(WIDTH)
        assert width <= window


def test_names_and_prompts_are_text(page: Page, served: Served, done: Any) -> None:
    record = served.folder / "clip" / RECORD
    whole = record.read_text()
    try:
        record.write_text(whole.replace(EDIT, json.dumps(SCRIPT)))
        page.click("button[role=tab]:nth-of-type(2)")
        page.until(lambda: SCRIPT in page.text("#cards") and page.all("#single video"))
        assert not page.all("#cards img[src='x']")
    finally:
        record.write_text(whole)
